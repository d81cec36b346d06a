"""YAML files of configs: safe, without duplicate keys, with line numbers in errors, and one built on another."""

import re
from pathlib import Path
from typing import Any

import yaml

from torchrec_qr.cli.schema.config_error import ConfigError, errors_in_file
from torchrec_qr.cli.schema.key_paths import overlaid

# Use libyaml if PyYAML was built with it, because ten thousand tables need its speed, ten times that of Python.
_Fastest: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_MERGE = ("tag:yaml.org,2002:merge", "<<")


class _Loader(_Fastest):
    """PyYAML's safe loader, for which 1e-3 is a number, as it is in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds; an empty file holds an empty one.

    The key ``base`` names another file, relative to this one, over whose mapping this one is laid by
    ``torchrec_qr.cli.schema.key_paths.overlaid``. That file may have a base too.

    Raises:
        ConfigError: not YAML, with line and column; a key that occurs twice in a mapping; not a mapping; a base that
            cannot be read, or that builds on this file. Names each file on the way to what is wrong.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file, overlay = Path(folder) / "job.yaml", Path(folder) / "short.yaml"
        ...     _ = file.write_text("tables: []\\ntrain: {batch_size: 1_024, epochs: 2}\\nlearning_rate: 1e-3")
        ...     _ = overlay.write_text("base: job.yaml\\ntrain: {epochs: 1}")
        ...     read_yaml(overlay)
        {'tables': [], 'train': {'batch_size': 1024, 'epochs': 1}, 'learning_rate': 0.001}
    """
    return _on_its_base(Path(path), [])


def read_value(key: str, text: str) -> Any:
    """Returns the value that ``text`` is in YAML, for the key of this path.

    Raises:
        ConfigError: not YAML.

    Example:
        >>> read_value("optimizer.sparse.lr", "1e-3")
        0.001
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(key, text, "a value in YAML", f"{text!r} is not YAML: {error}") from error


def _on_its_base(path: Path, above: list[Path]) -> dict[str, Any]:
    """Returns the file's mapping laid over that of its base; ``above`` are the files that build on this one."""
    with errors_in_file(path):
        content = _parsed(path)
        if "base" not in content:
            return content
        base = content.pop("base")
        if not isinstance(base, str):
            raise ConfigError("base", base, "the name of a file, relative to this one")
        file, above = path.parent / base, [*above, path.resolve()]
        if file.resolve() in above:
            raise ConfigError("base", base, "a file that does not build on this one", f"{base!r} builds on this file")
        try:
            below = _on_its_base(file, above)
        except OSError as error:
            raise ConfigError("base", base, "a file", f"{base!r} cannot be read: {error.strerror}") from error
        except ConfigError as error:
            raise ConfigError("base", base, error.allowed, str(error)) from error
        return overlaid(below, content)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_bytes())
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            # Resolve before construction, because that would silently keep the last of two equal keys.
            _resolve(node, set())
            content = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = ", ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
        raise ConfigError(_place(mark) if mark else "", None, "YAML", problem or str(error)) from error
    if not isinstance(content, dict):
        raise ConfigError("", content, "a mapping of sections")
    return content


def _resolve(node: yaml.Node, seen: set[int]) -> None:
    """Refuses duplicate keys and merges what ``<<`` refers to, in place, in ``node`` and all below it.

    PyYAML's own merge takes the wrong one of two values if a merged mapping overrides a key that it merged itself.
    """
    if id(node) in seen:  # by an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        pairs: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if (name := _identity(key)) in pairs:
                line = pairs[name][0].start_mark.line + 1
                problem = f"duplicate key {key.value!r}, first on line {line}"
                raise ConfigError(_place(key.start_mark), key.value, "each key once", problem)
            pairs[name] = (key, value)
            _resolve(value, seen)
        if _MERGE in pairs:
            source = pairs[_MERGE][1]
            sources = source.value if isinstance(source, yaml.SequenceNode) else [source]
            if all(isinstance(s, yaml.MappingNode) for s in sources):  # construction refuses others
                del pairs[_MERGE]
                for inherited in (pair for s in sources for pair in s.value):
                    pairs.setdefault(_identity(inherited[0]), inherited)
        node.value = list(pairs.values())
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _resolve(item, seen)


def _identity(key: yaml.Node) -> object:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
