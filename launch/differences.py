"""Differences between the meaning that a run has kept and the one that a job gives now."""

from typing import Any


def differences(saved: Any, here: Any, path: str = "") -> list[str]:
    """Returns a phrase per value in which two descriptions differ.

    Example:
        >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
        ['a.b: saved 1, here 2']
    """
    if isinstance(saved, dict) and isinstance(here, dict):
        keys = [*saved, *(k for k in here if k not in saved)]
        return [d for k in keys for d in differences(saved.get(k), here.get(k), f"{path}.{k}" if path else str(k))]
    return [] if saved == here else [f"{path}: saved {saved!r}, here {here!r}"]
