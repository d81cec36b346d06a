"""Generalized quotient-remainder partitions: the digits of the id in a mixed radix."""

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torchrec_qr.partitions.base import ClosedForm
from torchrec_qr.partitions.least_rows import even_split, largest_main_split, least_total
from torchrec_qr.partitions.validation import (
    budget_too_small,
    checked_between,
    checked_int,
    checked_num_ids,
    checked_sizes,
    rows_of_ratio,
)


class MixedRadix(ClosedForm):
    """Generalized quotient-remainder: p_j(x) = (x // M_j) % m_j with M_j = ∏_{i<j} m_i (arXiv:1909.02107, section 3.1).

    Args:
        num_ids: S, at most 2^40.
        sizes: m_1, ..., m_K, each at least 1, with ∏ m_j >= S.

    Raises:
        TypeError: `num_ids` or a size is not an int.
        ValueError: `num_ids` or a size outside [1, 2^40], no sizes, or ∏ m_j < S.

    >>> import torch
    >>> MixedRadix(24, [4, 3, 2]).rows(torch.tensor([0, 5, 23])).tolist()
    [[0, 0, 0], [1, 1, 0], [3, 2, 1]]
    """

    kind = "mixed_radix"

    def __init__(self, num_ids: int, sizes: Sequence[int]) -> None:
        owner = type(self).__name__
        num_ids, checked = checked_num_ids(owner, num_ids), checked_sizes(owner, sizes)
        product = math.prod(checked)
        if product < num_ids:
            raise ValueError(
                f"{owner}: the product of sizes must be at least num_ids ({num_ids}), got sizes {list(checked)} with "
                f"product {product}: ids 0 and {product} would share all rows"
            )
        # A digit above S is 0 for every id, and so it is with stride S; the true stride may not fit int64.
        strides = tuple(min(stride, num_ids) for stride in accumulate(checked[:-1], mul, initial=1))
        super().__init__(num_ids, checked, strides)

    @classmethod
    def balanced(cls, num_ids: int, num_partitions: int = 2) -> "MixedRadix":
        """The sizes of least total, near S^(1/K) each, the largest first.

        >>> MixedRadix.balanced(1_000_000, num_partitions=3)
        MixedRadix(num_ids=1000000, sizes=[100, 100, 100])
        """
        num_ids, count = _checked_counts(cls.__name__, num_ids, num_partitions)
        return cls(num_ids, even_split(least_total(num_ids, count), count))

    @classmethod
    def for_budget(cls, num_ids: int, rows: int, num_partitions: int = 2) -> "MixedRadix":
        """At most `rows` rows in total, the first partition as large as they allow: the fewest ids share its rows.

        The first partition has at most S rows; the others are as small, and as even, as can be.

        Raises:
            ValueError: `rows` is below the total of `balanced`.

        >>> MixedRadix.for_budget(1_000_000, rows=10_030, num_partitions=3)
        MixedRadix(num_ids=1000000, sizes=[10010, 10, 10])
        """
        num_ids, count = _checked_counts(cls.__name__, num_ids, num_partitions)
        rows = checked_int(cls.__name__, "rows", rows)
        least = least_total(num_ids, count)
        if rows < least:
            raise budget_too_small(cls.__name__, num_ids, rows, least, count)
        return cls(num_ids, largest_main_split(num_ids, rows, count))

    @classmethod
    def for_compression(cls, num_ids: int, ratio: float, num_partitions: int = 2) -> "MixedRadix":
        """`for_budget` with ⌊S / ratio⌋ rows, ratio >= 1.

        >>> MixedRadix.for_compression(1_000_000, ratio=4.0)
        MixedRadix(num_ids=1000000, sizes=[249995, 5])
        """
        rows = rows_of_ratio(cls.__name__, num_ids, ratio)
        try:
            return cls.for_budget(num_ids, rows, num_partitions)
        except ValueError as error:
            raise ValueError(f"{error} (ratio {ratio})") from None

    def describe(self) -> dict[str, object]:
        return {"sizes": list(self.sizes)}


def _checked_counts(owner: str, num_ids: object, num_partitions: object) -> tuple[int, int]:
    return checked_num_ids(owner, num_ids), checked_between(owner, "num_partitions", num_partitions, 1, None)
