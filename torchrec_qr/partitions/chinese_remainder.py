"""Chinese remainder partitions: the remainders of an id by pairwise coprime sizes."""

import math
from dataclasses import dataclass
from itertools import combinations

from torchrec_qr.partitions.least_rows import largest_main_coprime_split, least_coprime_split
from torchrec_qr.partitions.sized_spec import SizedSpec


@dataclass(frozen=True, kw_only=True)
class ChineseRemainder(SizedSpec):
    """Chinese remainder partitions: p_j(x) = x % m_j, the m_j pairwise coprime (arXiv:1909.02107, section 3.1).

    Args:
        sizes (Sequence[int] | None): m_1, ..., m_K, each at least 1, pairwise coprime, with ∏ m_j >= S.
        compression (float | None): means ``rows`` of ⌊S / compression⌋.
        rows (int | None): the most rows in total. The first partition is as large as they allow, up to S, so that the
            fewest ids share its rows. The others have the least total beside it.
        balanced (bool): the least rows in total, near S^(1/K) for each partition, the largest first.
        num_partitions (int | None): K, at most 8, if ``sizes`` is not given. Default: 2.

    Raises:
        ValueError: not exactly one size is given, or ``num_partitions`` beside ``sizes``.

    Example:
        >>> import torch
        >>> ChineseRemainder(sizes=[4, 3]).bind(12).rows(torch.tensor([0, 5, 11])).tolist()
        [[0, 0], [1, 2], [3, 2]]
        >>> ChineseRemainder(balanced=True, num_partitions=3).bind(1_000_000).sizes
        (103, 101, 97)
        >>> ChineseRemainder(rows=10_030, num_partitions=3).bind(1_000_000).sizes
        (10009, 11, 10)
    """

    kind = "chinese_remainder"
    # Up to here the search takes milliseconds, and each further coprime size multiplies it.
    max_searched = 8

    @classmethod
    def _strides(cls, s: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        for (i, first), (j, second) in combinations(enumerate(sizes), 2):
            if (common := math.gcd(first, second)) > 1:
                raise ValueError(
                    f"{cls.__name__}: sizes must be pairwise coprime, got {list(sizes)}: sizes[{i}] = {first} and "
                    f"sizes[{j}] = {second} have the common factor {common}"
                )
        return (1,) * len(sizes)

    _least_split = staticmethod(least_coprime_split)
    _largest_main_split = staticmethod(largest_main_coprime_split)
