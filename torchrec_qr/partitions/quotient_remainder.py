"""Partitions of the quotient-remainder trick."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torchrec_qr.partitions.bound import ClosedForm
from torchrec_qr.partitions.checks import (
    budget_too_small,
    checked_between,
    checked_budget,
    checked_num_embeddings,
)
from torchrec_qr.partitions.spec import PartitionSpec

Grouping = Literal["strided", "adjacent"]


@dataclass(frozen=True, kw_only=True)
class QuotientRemainder(PartitionSpec):
    """The quotient-remainder trick: at most m = ``num_collisions`` ids share a row of partition 0, of R_0 = ⌈S/m⌉ rows.

    - ``"strided"``: p_0(x) = x % R_0, p_1(x) = x // R_0, of ⌈S/R_0⌉ <= m rows. Ids R_0 apart share a row of partition 0
      (arXiv:1909.02107, algorithm 2). If ids are in order of frequency, frequent ids share no row.
    - ``"adjacent"``: p_0(x) = x // m, p_1(x) = x % m, of m rows. m consecutive ids share a row of partition 0
      (the authors' code).

    If m divides S, the two differ by the bijection of ids x -> (x % R_0) · m + x // R_0.

    Args:
        num_collisions (int | None): m, between 1 and S.
        compression (float | None): means ``rows`` of ⌊S / compression⌋.
        rows (int | None): the most rows in total, at least ⌈2√S⌉. The spec takes the fewest collisions they allow.
        balanced (bool): the least rows in total, ⌈2√S⌉, with partition 0 the main one.
        grouping (str): which ids share a row of partition 0, ``"strided"`` or ``"adjacent"``.

    Raises:
        ValueError: not exactly one size is given.

    Example:
        >>> import torch
        >>> strided = QuotientRemainder(num_collisions=4).bind(10)
        >>> strided.sizes, strided.rows(torch.tensor([0, 1, 3, 9])).tolist()
        ((3, 4), [[0, 0], [1, 0], [0, 1], [0, 3]])
        >>> adjacent = QuotientRemainder(num_collisions=4, grouping="adjacent").bind(10)
        >>> adjacent.sizes, adjacent.rows(torch.tensor([0, 1, 3, 9])).tolist()
        ((3, 4), [[0, 0], [0, 1], [0, 3], [2, 1]])
        >>> [QuotientRemainder(**size).bind(1_000_000).sizes
        ...     for size in ({"compression": 3.9}, {"rows": 250_004}, {"balanced": True})]
        [(250000, 4), (250000, 4), (1000, 1000)]
    """

    kind = "quotient_remainder"

    num_collisions: int | None = None
    compression: float | None = None
    rows: int | None = None
    balanced: bool = False
    grouping: Grouping = "strided"

    def __post_init__(self) -> None:
        self._check_sized_once(("num_collisions", "compression", "rows", "balanced"))

    def bind(self, num_embeddings: int) -> ClosedForm:
        owner = type(self).__name__
        s = checked_num_embeddings(owner, num_embeddings)
        if self.grouping not in get_args(Grouping):
            raise ValueError(f"{owner}: grouping must be 'strided' or 'adjacent', got {self.grouping!r}")
        m = self._collisions(owner, s)
        main_rows = -(-s // m)
        if self.grouping == "strided":
            return ClosedForm(s, (main_rows, -(-s // main_rows)), (1, main_rows))
        return ClosedForm(s, (main_rows, m), (m, 1))

    def _collisions(self, owner: str, s: int) -> int:
        if self.num_collisions is not None:
            return checked_between(owner, "num_collisions", self.num_collisions, 1, s, " (num_embeddings)")
        # ⌈2√S⌉ = min over m of m + ⌈S/m⌉: the least T with ⌊T/2⌋ · ⌈T/2⌉ >= S, that is T² >= 4S.
        least = math.isqrt(4 * s - 1) + 1
        if self.balanced:
            return least // 2
        rows = checked_budget(owner, s, self.rows, self.compression)
        if rows < least:
            raise budget_too_small(owner, s, rows, least, 2, self.compression)
        # m + ⌈S/m⌉ <= rows  <=>  m (rows - m) >= S  <=>  rows - 2m <= √(rows² - 4S), for the smaller m. The strided
        # grouping has the same answer, because its ⌈S/R_0⌉ is the least m with the same R_0.
        return (rows - math.isqrt(rows * rows - 4 * s) + 1) // 2
