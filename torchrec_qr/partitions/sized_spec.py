"""The base class of specs with sizes m_1, ..., m_K, which are given or searched for."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchrec_qr.partitions.bound import ClosedForm
from torchrec_qr.partitions.checks import (
    budget_too_small,
    checked_between,
    checked_budget,
    checked_num_embeddings,
    checked_sizes,
)
from torchrec_qr.partitions.spec import PartitionSpec

_DEFAULT_PARTITIONS = 2


@dataclass(frozen=True, kw_only=True)
class SizedSpec(PartitionSpec):
    """Specs of closed forms that are complementary for all sizes with ∏ m_j >= S that `_strides` allows."""

    # The most sizes that `bind` searches for. None is no limit.
    max_searched: ClassVar[int | None] = None

    sizes: Sequence[int] | None = None
    compression: float | None = None
    rows: int | None = None
    balanced: bool = False
    num_partitions: int | None = None

    def __post_init__(self) -> None:
        self._check_sized_once(("sizes", "compression", "rows", "balanced"))
        if self.sizes is not None and self.num_partitions is not None:
            raise ValueError(
                f"{type(self).__name__}: num_partitions must not be given beside sizes, got {self.num_partitions}"
            )
        # Store a tuple, because specs are hashed and compared. `bind` refuses what is no sequence.
        if isinstance(self.sizes, Iterable) and not isinstance(self.sizes, str | bytes):
            sizes = self.sizes.tolist() if isinstance(self.sizes, Tensor) else self.sizes
            object.__setattr__(self, "sizes", tuple(sizes))

    def bind(self, num_embeddings: int) -> ClosedForm:
        owner = type(self).__name__
        s = checked_num_embeddings(owner, num_embeddings)
        sizes = self._search(owner, s) if self.sizes is None else checked_sizes(owner, self.sizes)
        strides = self._strides(s, sizes)
        if (product := math.prod(sizes)) < s:
            raise ValueError(
                f"{owner}: the product of sizes must be at least num_embeddings ({s}), got sizes {list(sizes)} with "
                f"product {product}: ids 0 and {product} would share all rows"
            )
        return ClosedForm(s, sizes, strides)

    def _search(self, owner: str, s: int) -> tuple[int, ...]:
        given = _DEFAULT_PARTITIONS if self.num_partitions is None else self.num_partitions
        hint = "" if self.max_searched is None else " (more partitions need sizes)"
        count = checked_between(owner, "num_partitions", given, 1, self.max_searched, hint)
        if self.balanced:
            return self._least_split(s, count)
        rows = checked_budget(owner, s, self.rows, self.compression)
        least = sum(self._least_split(s, count))
        if rows < least:
            raise budget_too_small(owner, s, rows, least, count, self.compression)
        return self._largest_main_split(s, rows, count)

    @classmethod
    @abstractmethod
    def _strides(cls, s: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the stride of each partition. Sizes that are not allowed are a ValueError."""

    @staticmethod
    @abstractmethod
    def _least_split(product: int, count: int) -> tuple[int, ...]:
        """Returns the ``count`` allowed sizes of least total with ∏ m_j >= ``product``."""

    @staticmethod
    @abstractmethod
    def _largest_main_split(product: int, rows: int, count: int) -> tuple[int, ...]:
        """Returns ``count`` allowed sizes of at most ``rows`` in total, with the largest first one."""
