"""Chinese remainder partitions: the remainders of the id by pairwise coprime sizes."""

import math
from collections.abc import Sequence
from itertools import combinations

from torchrec_qr.partitions.base import ClosedForm
from torchrec_qr.partitions.least_rows import largest_main_coprime_split, least_coprime_split
from torchrec_qr.partitions.validation import (
    budget_too_small,
    checked_between,
    checked_int,
    checked_num_ids,
    checked_sizes,
    rows_of_ratio,
)

# Each further coprime size multiplies the search of `balanced` and `for_budget`; up to here it takes milliseconds.
MAX_SEARCHED_PARTITIONS = 8


class ChineseRemainder(ClosedForm):
    """Chinese remainder partitions: p_j(x) = x % m_j, the m_j pairwise coprime (arXiv:1909.02107, section 3.1).

    Args:
        num_ids: S, at most 2^40.
        sizes: m_1, ..., m_K, each at least 1, pairwise coprime, with ∏ m_j >= S.

    Raises:
        TypeError: `num_ids` or a size is not an int.
        ValueError: `num_ids` or a size outside [1, 2^40], no sizes, two sizes with a common factor, or ∏ m_j < S.

    >>> import torch
    >>> ChineseRemainder(12, [4, 3]).rows(torch.tensor([0, 5, 11])).tolist()
    [[0, 0], [1, 2], [3, 2]]
    """

    kind = "chinese_remainder"

    def __init__(self, num_ids: int, sizes: Sequence[int]) -> None:
        owner = type(self).__name__
        num_ids, checked = checked_num_ids(owner, num_ids), checked_sizes(owner, sizes)
        for (i, first), (j, second) in combinations(enumerate(checked), 2):
            if (common := math.gcd(first, second)) > 1:
                raise ValueError(
                    f"{owner}: sizes must be pairwise coprime, got {list(checked)}: sizes[{i}] = {first} and "
                    f"sizes[{j}] = {second} have the common factor {common}"
                )
        product = math.prod(checked)
        if product < num_ids:
            raise ValueError(
                f"{owner}: the product of sizes must be at least num_ids ({num_ids}), got sizes {list(checked)} with "
                f"product {product}: ids 0 and {product} would share all rows"
            )
        super().__init__(num_ids, checked, (1,) * len(checked))

    @classmethod
    def balanced(cls, num_ids: int, num_partitions: int = 2) -> "ChineseRemainder":
        """The pairwise coprime sizes of least total, near S^(1/K) each, the largest first.

        >>> ChineseRemainder.balanced(1_000_000, num_partitions=3)
        ChineseRemainder(num_ids=1000000, sizes=[103, 101, 97])
        """
        num_ids, count = _checked_counts(cls.__name__, num_ids, num_partitions)
        return cls(num_ids, least_coprime_split(num_ids, count))

    @classmethod
    def for_budget(cls, num_ids: int, rows: int, num_partitions: int = 2) -> "ChineseRemainder":
        """At most `rows` rows in total, the first partition as large as they allow: the fewest ids share its rows.

        The first partition has at most S rows; the others have the least total that is possible beside it.

        Raises:
            ValueError: `rows` is below the total of `balanced`.

        >>> ChineseRemainder.for_budget(1_000_000, rows=10_030, num_partitions=3)
        ChineseRemainder(num_ids=1000000, sizes=[10009, 11, 10])
        """
        num_ids, count = _checked_counts(cls.__name__, num_ids, num_partitions)
        rows = checked_int(cls.__name__, "rows", rows)
        least = sum(least_coprime_split(num_ids, count))
        if rows < least:
            raise budget_too_small(cls.__name__, num_ids, rows, least, count)
        return cls(num_ids, largest_main_coprime_split(num_ids, rows, count))

    @classmethod
    def for_compression(cls, num_ids: int, ratio: float, num_partitions: int = 2) -> "ChineseRemainder":
        """`for_budget` with ⌊S / ratio⌋ rows, ratio >= 1.

        >>> ChineseRemainder.for_compression(1_000_000, ratio=4.0)
        ChineseRemainder(num_ids=1000000, sizes=[249994, 5])
        """
        rows = rows_of_ratio(cls.__name__, num_ids, ratio)
        try:
            return cls.for_budget(num_ids, rows, num_partitions)
        except ValueError as error:
            raise ValueError(f"{error} (ratio {ratio})") from None

    def describe(self) -> dict[str, object]:
        return {"sizes": list(self.sizes)}


def _checked_counts(owner: str, num_ids: object, num_partitions: object) -> tuple[int, int]:
    count = checked_between(
        owner, "num_partitions", num_partitions, 1, MAX_SEARCHED_PARTITIONS, " (give more sizes to the constructor)"
    )
    return checked_num_ids(owner, num_ids), count
