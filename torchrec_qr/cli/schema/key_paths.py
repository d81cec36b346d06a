"""Places in a config by their path, ``tables[*].partitions.rows``, and one config laid over another."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torchrec_qr.cli.schema.config_error import ConfigError, did_you_mean

_KEY = r"[A-Za-z_][\w-]*"
_PATH = re.compile(rf"{_KEY}(\.{_KEY}|\[[^\[\]]+\])*")
_STEP = re.compile(rf"({_KEY})|\[([^\[\]]+)\]")
_GREATER = re.compile(rf"({_KEY})>(\d[\d_]*)")


def places(root: dict[str, Any], path: str) -> Iterator[tuple[Any, Any]]:
    """Yields the containers in ``root``, and the key or index in each, that a path leads to.

    A path has keys and entries of lists. An entry is ``[3]`` by index, ``[cat_3]`` by its ``name``, ``[rows>100]`` if
    its ``rows`` are more, and ``[*]`` for all. A mapping that lacks a key of the path gets it.

    Raises:
        ConfigError: not a path, an entry that is not there, a key within what has none.

    Example:
        >>> job = {"tables": [{"name": "a", "rows": 9}, {"name": "b", "rows": 100}]}
        >>> for table, key in places(job, "tables[rows>9].rows"):
        ...     print(table["name"], key)
        b rows
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ConfigError("", path, "a path of keys, such as model.embedding_dim or tables[0].pooling")
    yield from _places(root, _STEP.findall(path), path, "")


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of ``below`` with what ``above`` has: its mappings are merged, all other values replace.

    A key of ``above`` may be a path, for entries of a list; see `places`. Later keys win.

    Example:
        >>> overlaid({"train": {"seed": 0, "epochs": 1}, "tables": [{"name": "a"}, {"name": "b"}]},
        ...          {"train": {"epochs": 2}, "tables[*]": {"pooling": "mean"}, "tables[b].pooling": "sum"})
        {'train': {'seed': 0, 'epochs': 2},
         'tables': [{'name': 'a', 'pooling': 'mean'}, {'name': 'b', 'pooling': 'sum'}]}
    """
    result: dict[str, Any] = copied(below)
    for path, value in above.items():
        for parent, key in places(result, path):
            _merge(parent, key, value)
    return result


def copied(node: Any) -> Any:
    """Returns a copy in which nothing is shared, so that a change at one path is a change there alone.

    A deepcopy would keep as one what a YAML anchor made one.
    """
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return [copied(item) for item in node] if isinstance(node, list) else node


def _merge(parent: Any, key: Any, value: Any) -> None:
    there = parent.get(key) if isinstance(parent, dict) else parent[key]
    if isinstance(there, dict) and isinstance(value, dict):
        for name, inner in value.items():
            _merge(there, name, inner)
    else:
        parent[key] = copied(value)


def _places(node: Any, steps: list[tuple[str, str]], path: str, done: str) -> Iterator[tuple[Any, Any]]:
    (key, entry), *rest = steps
    if entry:
        if not isinstance(node, list):
            raise ConfigError(path, node, f"{done} is not a list", f"{done} is not a list")
        keys: list[Any] = _entries(node, entry, path, done)
    else:
        if not isinstance(node, dict):
            raise ConfigError(path, node, f"{done} has no keys", f"{done} has no keys")
        keys = [key]
    for key in keys:
        if not rest:
            yield node, key
            continue
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        name = f"{done}[{key}]" if isinstance(key, int) else f"{done}.{key}".lstrip(".")
        yield from _places(node[key], rest, path, name)


def _entries(node: list[Any], entry: str, path: str, done: str) -> list[int]:
    """Returns the indices of a list's entries that ``[entry]`` selects."""
    if entry == "*":
        return list(range(len(node)))
    if entry.isdecimal():
        if int(entry) >= len(node):
            raise ConfigError(path, int(entry), f"indices 0..{len(node) - 1}", f"{done} has {len(node)} entries")
        return [int(entry)]
    mappings = {i: item for i, item in enumerate(node) if isinstance(item, dict)}
    if greater := _GREATER.fullmatch(entry):
        key, least = greater[1], int(greater[2])
        found = [i for i, item in mappings.items() if isinstance(item.get(key), int | float) and item[key] > least]
        problem = f"{done} has no entry whose {key} is more than {least}"
    else:
        found = [i for i, item in mappings.items() if item.get("name") == entry]
        names = [str(item.get("name")) for item in mappings.values()]
        problem = f"{done} has no entry of the name {entry!r}; {did_you_mean(entry, names)}".rstrip("; ")
    if not found:
        raise ConfigError(path, entry, "an entry that is there", problem)
    return found
