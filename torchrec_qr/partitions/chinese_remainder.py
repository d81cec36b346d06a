"""Chinese remainder partitions: the remainders of the id by pairwise coprime sizes."""

import math
from itertools import combinations

from torchrec_qr.partitions.least_rows import largest_main_coprime_split, least_coprime_split
from torchrec_qr.partitions.of_sizes import OfSizes


class ChineseRemainder(OfSizes):
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
    # Each further coprime size multiplies the search; up to here it takes milliseconds.
    max_searched = 8

    @classmethod
    def _strides(cls, num_ids: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        for (i, first), (j, second) in combinations(enumerate(sizes), 2):
            if (common := math.gcd(first, second)) > 1:
                raise ValueError(
                    f"{cls.__name__}: sizes must be pairwise coprime, got {list(sizes)}: sizes[{i}] = {first} and "
                    f"sizes[{j}] = {second} have the common factor {common}"
                )
        return (1,) * len(sizes)

    _least_split = staticmethod(least_coprime_split)
    _largest_main_split = staticmethod(largest_main_coprime_split)
