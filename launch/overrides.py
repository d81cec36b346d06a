"""``--set model.embedding_dim=32``: a key of a config, by its path, and its value in YAML."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from torchrec_qr.schema import ConfigError

_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*|\[(\d+|\*)\])*")
_STEP = re.compile(r"([A-Za-z_][\w-]*)|\[(\d+|\*)\]")


def override(sections: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of ``sections`` with the values of ``assignments``, each ``path=value``, later ones winning.

    A path is of keys and of indices of lists, ``[*]`` being all of a list. Whether a key is known, and its value right,
    is for the config to say.

    Raises:
        ConfigError: no ``=``, not a path, an index beyond its list, a key within what has none, a value not in YAML.

    Example:
        >>> job = {"model": {"embedding_dim": 16}, "tables": [{"embedding_dim": 16}, {"embedding_dim": 16}]}
        >>> override(job, ["model.embedding_dim=32", "tables[*].embedding_dim=32", "optimizer.sparse.lr=1e-3"])
        {'model': {'embedding_dim': 32}, 'tables': [{'embedding_dim': 32}, {'embedding_dim': 32}],
         'optimizer': {'sparse': {'lr': 0.001}}}
    """
    result = _copy(sections)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not _PATH.fullmatch(path):
            raise ConfigError("", assignment, "KEY=VALUE, such as model.embedding_dim=32 or tables[0].pooling=mean")
        steps = [key or (index if index == "*" else int(index)) for key, index in _STEP.findall(path)]
        for parent, key in _places(result, steps, path):
            parent[key] = _value(path, text)
    return result


def _places(node: Any, steps: list[str | int], path: str, done: str = "") -> Iterator[tuple[Any, Any]]:
    """Yields the containers, and the key or index in each, that ``steps`` lead to."""
    step, *rest = steps
    if isinstance(step, int) or step == "*":
        if not isinstance(node, list):
            raise ConfigError(path, node, f"{done} is not a list", f"{done} is not a list")
        if step != "*" and int(step) >= len(node):
            raise ConfigError(path, step, f"indices 0..{len(node) - 1}", f"{done} has {len(node)} entries")
        keys: list[Any] = list(range(len(node))) if step == "*" else [step]
    else:
        if not isinstance(node, dict):
            raise ConfigError(path, node, f"{done} has no keys", f"{done} has no keys")
        keys = [step]
    for key in keys:
        if not rest:
            yield node, key
            continue
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        name = f"{done}[{key}]" if isinstance(key, int) else f"{done}.{key}".lstrip(".")
        yield from _places(node[key], rest, path, name)


def _copy(node: Any) -> Any:
    # Not deepcopy, which would keep as one what a YAML anchor made one: an override must change its own place alone.
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(item) for item in node] if isinstance(node, list) else node


class _Loader(yaml.SafeLoader):
    """For which 1e-3 is a number, as in the config's file."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _value(path: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(path, text, "a value in YAML", f"{text!r} is not YAML: {error}") from error
