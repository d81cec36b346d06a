"""Checks of constructor arguments; every message names the class, the field, the value given and what is allowed."""

import math
import operator
from collections.abc import Iterable
from typing import SupportsIndex, cast

# Leaves ids, strides and the row codes made of them far from the end of int64.
MAX_NUM_IDS = 2**40


def checked_int(owner: str, field: str, value: object) -> int:
    """`value` as an int; TypeError for a bool, a float, a string and everything else that is not an integer."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise TypeError(f"{owner}: {field} must be an int, got {value!r} of type {type(value).__name__}") from None


def checked_between(owner: str, field: str, value: object, low: int, high: int | None, high_name: str = "") -> int:
    """`value` as an int in [low, high]; no upper bound where `high` is None. `high_name` says what the bound is."""
    number = checked_int(owner, field, value)
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}{high_name}"
        raise ValueError(f"{owner}: {field} must be {allowed}, got {number}")
    return number


def checked_num_ids(owner: str, value: object) -> int:
    """`value` as the number of ids S, 1 <= S <= 2^40."""
    return checked_between(owner, "num_ids", value, 1, MAX_NUM_IDS, " (2^40)")


def checked_sizes(owner: str, value: object) -> tuple[int, ...]:
    """`value` as a non-empty tuple of row counts, each between 1 and 2^40."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{owner}: sizes must be a sequence of ints, got {value!r} of type {type(value).__name__}")
    sizes = tuple(
        checked_between(owner, f"sizes[{j}]", size, 1, MAX_NUM_IDS, " (2^40)") for j, size in enumerate(value)
    )
    if not sizes:
        raise ValueError(f"{owner}: sizes must hold at least one size, got none")
    return sizes


def rows_of_ratio(owner: str, num_ids: object, ratio: object) -> int:
    """⌊S / ratio⌋, the row budget of a compression ratio >= 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{owner}: ratio must be a float, got {ratio!r} of type {type(ratio).__name__}")
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"{owner}: ratio must be finite and at least 1, got {ratio}")
    return math.floor(checked_num_ids(owner, num_ids) / ratio)


def budget_too_small(owner: str, num_ids: int, rows: int, least: int, num_partitions: int) -> ValueError:
    """The error of a row budget below the least total that keeps all ids apart."""
    return ValueError(
        f"{owner}: rows must be at least {least}, the least total that keeps {num_ids} ids apart with "
        f"{num_partitions} partitions, got {rows}"
    )
