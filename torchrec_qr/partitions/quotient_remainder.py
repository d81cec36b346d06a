"""The quotient-remainder trick."""

import math
from typing import Literal, get_args

from torchrec_qr.partitions.base import ClosedForm
from torchrec_qr.partitions.validation import (
    budget_too_small,
    checked_between,
    checked_int,
    checked_num_ids,
    rows_of_ratio,
)

Grouping = Literal["strided", "adjacent"]


class QuotientRemainder(ClosedForm):
    """The quotient-remainder trick: at most m = `num_collisions` ids share a row of partition 0, of R_0 = ⌈S/m⌉ rows.

    - `"strided"`: p_0(x) = x % R_0, p_1(x) = x // R_0, of ⌈S/R_0⌉ <= m rows; ids R_0 apart share a row of partition 0
      (arXiv:1909.02107, algorithm 2). Keeps frequent ids apart where ids follow frequency.
    - `"adjacent"`: p_0(x) = x // m, p_1(x) = x % m, of m rows; m neighbours share a row of partition 0
      (the authors' code).

    Where m divides S the two differ by the bijection of ids x -> (x % R_0) · m + x // R_0.

    Args:
        num_ids: S, at most 2^40.
        num_collisions: m, between 1 and S.
        grouping: which ids share a row of partition 0.

    Raises:
        TypeError: `num_ids` or `num_collisions` is not an int.
        ValueError: `num_ids` outside [1, 2^40], `num_collisions` outside [1, S], or an unknown `grouping`.

    >>> import torch
    >>> strided = QuotientRemainder(10, num_collisions=4)
    >>> strided.sizes, strided.rows(torch.tensor([0, 1, 3, 9])).tolist()
    ((3, 4), [[0, 0], [1, 0], [0, 1], [0, 3]])
    >>> adjacent = QuotientRemainder(10, num_collisions=4, grouping="adjacent")
    >>> adjacent.sizes, adjacent.rows(torch.tensor([0, 1, 3, 9])).tolist()
    ((3, 4), [[0, 0], [0, 1], [0, 3], [2, 1]])
    """

    kind = "quotient_remainder"
    num_collisions: int
    grouping: Grouping

    def __init__(self, num_ids: int, num_collisions: int, grouping: Grouping = "strided") -> None:
        owner = type(self).__name__
        num_ids = checked_num_ids(owner, num_ids)
        m = checked_between(owner, "num_collisions", num_collisions, 1, num_ids, " (num_ids)")
        if grouping not in get_args(Grouping):
            raise ValueError(f"{owner}: grouping must be 'strided' or 'adjacent', got {grouping!r}")
        main_rows = -(-num_ids // m)
        if grouping == "strided":
            super().__init__(num_ids, (main_rows, -(-num_ids // main_rows)), (1, main_rows))
        else:
            super().__init__(num_ids, (main_rows, m), (m, 1))
        self._set(num_collisions=m, grouping=grouping)

    @classmethod
    def balanced(cls, num_ids: int, num_partitions: int = 2, grouping: Grouping = "strided") -> "QuotientRemainder":
        """The partitions of least total rows, ⌈2√S⌉, with partition 0 the main one.

        >>> QuotientRemainder.balanced(1_000_000)
        QuotientRemainder(num_ids=1000000, num_collisions=1000, grouping='strided')
        """
        num_ids = _checked_pair(cls.__name__, num_ids, num_partitions)
        return cls(num_ids, _least_total(num_ids) // 2, grouping)

    @classmethod
    def for_budget(
        cls, num_ids: int, rows: int, num_partitions: int = 2, grouping: Grouping = "strided"
    ) -> "QuotientRemainder":
        """The fewest collisions m whose partitions have at most `rows` rows in total.

        Raises:
            ValueError: `rows` is below the least total, ⌈2√S⌉.

        >>> QuotientRemainder.for_budget(1_000_000, rows=250_004)
        QuotientRemainder(num_ids=1000000, num_collisions=4, grouping='strided')
        """
        num_ids = _checked_pair(cls.__name__, num_ids, num_partitions)
        rows = checked_int(cls.__name__, "rows", rows)
        least = _least_total(num_ids)
        if rows < least:
            raise budget_too_small(cls.__name__, num_ids, rows, least, 2)
        # m + ⌈S/m⌉ <= rows  <=>  m (rows - m) >= S  <=>  rows - 2m <= √(rows² - 4S), for the smaller m. Strided has the
        # same answer: its ⌈S/R_0⌉ is the least m of those with the same R_0.
        return cls(num_ids, (rows - math.isqrt(rows * rows - 4 * num_ids) + 1) // 2, grouping)

    @classmethod
    def for_compression(
        cls, num_ids: int, ratio: float, num_partitions: int = 2, grouping: Grouping = "strided"
    ) -> "QuotientRemainder":
        """`for_budget` with ⌊S / ratio⌋ rows, ratio >= 1.

        >>> QuotientRemainder.for_compression(1_000_000, ratio=3.9)
        QuotientRemainder(num_ids=1000000, num_collisions=4, grouping='strided')
        """
        rows = rows_of_ratio(cls.__name__, num_ids, ratio)
        try:
            return cls.for_budget(num_ids, rows, num_partitions, grouping)
        except ValueError as error:
            raise ValueError(f"{error} (ratio {ratio})") from None

    def describe(self) -> dict[str, object]:
        return {"num_collisions": self.num_collisions, "grouping": self.grouping}


def _least_total(num_ids: int) -> int:
    """⌈2√S⌉ = min over m of m + ⌈S/m⌉: the least T with ⌊T/2⌋ · ⌈T/2⌉ >= S, that is T² >= 4S."""
    return math.isqrt(4 * num_ids - 1) + 1


def _checked_pair(owner: str, num_ids: object, num_partitions: object) -> int:
    if checked_int(owner, "num_partitions", num_partitions) != 2:
        raise ValueError(f"{owner}: num_partitions must be 2 (MixedRadix takes more), got {num_partitions}")
    return checked_num_ids(owner, num_ids)
