"""Generalized quotient-remainder partitions: the digits of the id in a mixed radix."""

from itertools import accumulate
from operator import mul

from torchrec_qr.partitions.least_rows import even_split, largest_main_split, least_total
from torchrec_qr.partitions.of_sizes import OfSizes


class MixedRadix(OfSizes):
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

    @classmethod
    def _strides(cls, num_ids: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        # A digit above S is 0 for every id, and so it is with stride S; the true stride may not fit int64.
        return tuple(min(stride, num_ids) for stride in accumulate(sizes[:-1], mul, initial=1))

    @staticmethod
    def _least_split(product: int, count: int) -> tuple[int, ...]:
        return even_split(least_total(product, count), count)

    _largest_main_split = staticmethod(largest_main_split)
