"""Ids as digits in a mixed radix, of which each selects the row of one partition."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from torchrec_qr.ops.description import TableLayout


class Digit(NamedTuple):
    """A digit of ids, which is the row of ``partition``: 0 to ``size`` - 1 for ids in [0, S)."""

    partition: int
    size: int


def digits_of(layout: TableLayout, num_ids: int) -> list[Digit] | None:
    """Returns the digits of ids d_0, d_1, …, with x = d_0 + size_0 · (d_1 + size_1 · (d_2 + …)).

    Args:
        layout (TableLayout): the table.
        num_ids (int): S.

    Returns:
        list[Digit] | None: one for each partition; None if rows are no digits, as those of Chinese remainders.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout
        >>> strided = TableLayout("mult", (PartitionLayout(4, 1, 250), PartitionLayout(4, 250, 4)))
        >>> digits_of(strided, 1000)
        [Digit(partition=0, size=250), Digit(partition=1, size=4)]
        >>> coprime = TableLayout("mult", (PartitionLayout(4, 1, 40), PartitionLayout(4, 1, 27)))
        >>> digits_of(coprime, 1000) is None
        True
    """
    digits, stride = [], 1
    # A partition of one row may have the stride of the next one, and comes first.
    for j, of in sorted(enumerate(layout.partitions), key=lambda pair: (pair[1].divisor, pair[1].modulus)):
        # Class maps have the divisor 0. No stride is above S.
        if of.divisor != min(stride, num_ids):
            return None
        size = of.modulus or num_ids
        digits.append(Digit(j, min(size, -(-num_ids // of.divisor))))
        stride *= size
    return digits if stride >= num_ids else None


class IdBlock(NamedTuple):
    """Consecutive ids: one row of each of the upper digits, some of the split one, and all of the lower ones.

    Args:
        first: the first id.
        upper: the values of the upper digits, in the order of `IdGrid.upper`.
        rows: the values of the split digit.
    """

    first: int
    upper: tuple[int, ...]
    rows: slice


@dataclass(frozen=True)
class IdGrid:
    """The ids in blocks of consecutive ids, each the product of some values of one digit and all of the lower ones.

    Args:
        lower (list[Digit]): those of which a block has all values, from the lowest.
        split (Digit): the one of which a block has some values.
        upper (list[Digit]): those of which a block has one value, from the highest.
        num_rows (int): the values of ``split`` in a block.

    Example:
        >>> grid = id_grid([Digit(0, 10), Digit(1, 30)], num_lower=1, most_rows=20)
        >>> grid.period, [(block.first, block.rows) for block in grid.blocks()]
        (10, [(0, slice(0, 15, None)), (150, slice(15, 30, None))])
    """

    lower: list[Digit]
    split: Digit
    upper: list[Digit]
    num_rows: int

    @property
    def period(self) -> int:
        """P, the number of combinations of the lower digits."""
        return math.prod(digit.size for digit in self.lower)

    def blocks(self) -> Iterator[IdBlock]:
        """Yields the blocks in the order of ids, of which the last ones may be above S."""
        first = 0
        for upper in product(*(range(digit.size) for digit in self.upper)):
            for start in range(0, self.split.size, self.num_rows):
                rows = slice(start, min(start + self.num_rows, self.split.size))
                yield IdBlock(first, upper, rows)
                first += (rows.stop - rows.start) * self.period


def number_of_lower(digits: list[Digit], most: int, most_of_several: int) -> int:
    """Returns how many digits have few enough combinations, and at least one less than there are.

    Args:
        digits (list[Digit]): see `digits_of`.
        most (int): the most values of the lowest digit.
        most_of_several (int): the most combinations of several digits.

    Example:
        >>> number_of_lower([Digit(0, 10), Digit(1, 30), Digit(2, 5)], most=500, most_of_several=300)
        2
    """
    count = 0
    while count < len(digits) - 1:
        combinations = math.prod(digit.size for digit in digits[: count + 1])
        if combinations > (most_of_several if count else most):
            break
        count += 1
    return count


def id_grid(digits: list[Digit], num_lower: int, most_rows: int) -> IdGrid:
    """Returns the grid of nearly equal blocks, each of at most ``most_rows`` values of the split digit.

    Args:
        digits (list[Digit]): see `digits_of`.
        num_lower (int): how many digits are lower ones. The next one is split.
        most_rows (int): at least 1.
    """
    split = digits[num_lower]
    num_blocks = -(-split.size // most_rows)
    return IdGrid(digits[:num_lower], split, digits[:num_lower:-1], -(-split.size // num_blocks))
