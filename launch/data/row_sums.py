"""Sums over the numbers of rows, which show that each row of a split has been trained once."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from launch.data.rows import Array

_MODULUS = 2**40  # the sums of 2^23 ranks fit an int64


@dataclass(frozen=True)
class RowSums:
    """How many rows, Σ n and Σ n² of their numbers n, both modulo 2^40.

    Rows in any order, of any rank, add up to those of a whole split if each is there once. If one is there twice and
    another is not, they do not: Σ n differs if numbers are less than 2^40 apart.

    Example:
        >>> RowSums.sum([RowSums.of(np.array([4, 6])), RowSums.of(np.array([5, 3]))]) == RowSums.of_range(3, 7)
        True
        >>> RowSums.of(np.array([4, 4, 5, 5])) == RowSums.of_range(3, 7)
        False
    """

    rows: int = 0
    numbers: int = 0
    squares: int = 0

    @classmethod
    def of(cls, numbers: Array) -> "RowSums":
        """Returns those of rows with these numbers (N,)."""
        n = numbers.astype(np.uint64)
        return cls(len(n), int(n.sum(dtype=np.uint64)) % _MODULUS, int(np.dot(n, n)) % _MODULUS)

    @classmethod
    def of_range(cls, start: int, stop: int) -> "RowSums":
        """Returns those of rows [start, stop), each once."""

        def squares_below(n: int) -> int:
            return (n - 1) * n * (2 * n - 1) // 6

        numbers = (start + stop - 1) * (stop - start) // 2
        return cls(stop - start, numbers % _MODULUS, (squares_below(stop) - squares_below(start)) % _MODULUS)

    @classmethod
    def sum(cls, parts: Iterable["RowSums"]) -> "RowSums":
        """Returns those of the rows of all parts together."""
        rows = numbers = squares = 0
        for part in parts:
            rows, numbers, squares = rows + part.rows, numbers + part.numbers, squares + part.squares
        return cls(rows, numbers % _MODULUS, squares % _MODULUS)
