"""Checks of the values of specs. Each message has the class, the field, the value and what is allowed."""

import math
import operator
from collections.abc import Iterable
from typing import SupportsIndex, cast

# Ids, strides and row codes then fit int64.
MAX_NUM_EMBEDDINGS = 2**40


def checked_int(owner: str, field: str, value: object) -> int:
    """Returns ``value`` as an int. A bool, a float, a string and all else that is no integer is a TypeError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise TypeError(f"{owner}: {field} must be an int, got {value!r} of type {type(value).__name__}") from None


def checked_between(owner: str, field: str, value: object, low: int, high: int | None, high_name: str = "") -> int:
    """Returns ``value`` as an int in [low, high], whose message ends with ``high_name``. A high of None is no bound."""
    number = checked_int(owner, field, value)
    if number < low or (high is not None and number > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}{high_name}"
        raise ValueError(f"{owner}: {field} must be {allowed}, got {number}")
    return number


def checked_num_embeddings(owner: str, value: object) -> int:
    """Returns ``value`` as S, 1 <= S <= 2^40."""
    return checked_between(owner, "num_embeddings", value, 1, MAX_NUM_EMBEDDINGS, " (2^40)")


def checked_sizes(owner: str, value: object) -> tuple[int, ...]:
    """Returns ``value`` as a non-empty tuple of row counts, each between 1 and 2^40."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{owner}: sizes must be a sequence of ints, got {value!r} of type {type(value).__name__}")
    sizes = tuple(
        checked_between(owner, f"sizes[{j}]", size, 1, MAX_NUM_EMBEDDINGS, " (2^40)") for j, size in enumerate(value)
    )
    if not sizes:
        raise ValueError(f"{owner}: sizes must hold at least one size, got none")
    return sizes


def checked_budget(owner: str, num_embeddings: int, rows: object, compression: object) -> int:
    """Returns the most rows that partitions may have in total: ``rows`` if given, else ⌊S / compression⌋."""
    if rows is not None:
        return checked_int(owner, "rows", rows)
    if isinstance(compression, bool) or not isinstance(compression, int | float):
        raise TypeError(
            f"{owner}: compression must be a float, got {compression!r} of type {type(compression).__name__}"
        )
    if not (math.isfinite(compression) and compression >= 1):
        raise ValueError(f"{owner}: compression must be finite and at least 1, got {compression}")
    return math.floor(num_embeddings / compression)


def budget_too_small(
    owner: str, num_embeddings: int, rows: int, least: int, num_partitions: int, compression: float | None
) -> ValueError:
    """Returns the error of a row budget below the least total that keeps all ids apart."""
    given = "" if compression is None else f" (compression {compression})"
    return ValueError(
        f"{owner}: rows must be at least {least}, the least total that keeps {num_embeddings} ids apart with "
        f"{num_partitions} partitions, got {rows}{given}"
    )
