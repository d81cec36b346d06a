"""Generalized quotient-remainder partitions: the digits of an id in a mixed radix."""

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from torchrec_qr.partitions.least_rows import even_split, largest_main_split, least_total
from torchrec_qr.partitions.sized_spec import SizedSpec


@dataclass(frozen=True, kw_only=True)
class MixedRadix(SizedSpec):
    """Generalized quotient-remainder: p_j(x) = (x // M_j) % m_j with M_j = ∏_{i<j} m_i (arXiv:1909.02107, section 3.1).

    Args:
        sizes (Sequence[int] | None): m_1, ..., m_K, each at least 1, with ∏ m_j >= S.
        compression (float | None): means ``rows`` of ⌊S / compression⌋.
        rows (int | None): the most rows in total. The first partition is as large as they allow, up to S, so that the
            fewest ids share its rows. The others have the least total beside it.
        balanced (bool): the least rows in total, near S^(1/K) for each partition, the largest first.
        num_partitions (int | None): K, if ``sizes`` is not given. Default: 2.

    Raises:
        ValueError: not exactly one size is given, or ``num_partitions`` beside ``sizes``.

    Example:
        >>> import torch
        >>> MixedRadix(sizes=[4, 3, 2]).bind(24).rows(torch.tensor([0, 5, 23])).tolist()
        [[0, 0, 0], [1, 1, 0], [3, 2, 1]]
        >>> MixedRadix(balanced=True, num_partitions=3).bind(1_000_000).sizes
        (100, 100, 100)
        >>> MixedRadix(rows=10_030, num_partitions=3).bind(1_000_000).sizes
        (10010, 10, 10)
        >>> MixedRadix(compression=4.0).bind(1_000_000).sizes
        (249995, 5)
    """

    kind = "mixed_radix"

    @classmethod
    def _strides(cls, s: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        # Use at most stride S, because it gives digit 0 too, and the true stride may not fit int64.
        return tuple(min(stride, s) for stride in accumulate(sizes[:-1], mul, initial=1))

    @staticmethod
    def _least_split(product: int, count: int) -> tuple[int, ...]:
        return even_split(least_total(product, count), count)

    _largest_main_split = staticmethod(largest_main_split)
