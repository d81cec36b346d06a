"""Row codes: what the source rank sends in place of an id, where the rows of a table's base partition are split.

TorchRec cuts ids at multiples of a block size. A code cuts at boundaries of base rows, and the owner recovers the id:

    code = base_row(id) · C + rest(id)

For a closed form, base_row = (id // M) % r; rest = id % M + M · (id // (M·r)) and C = M · ⌈S / (M·r)⌉. For explicit
maps rest = id and C = S. All in int64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.ops.description import CodeLayout
from torchrec_qr.partitions import ClosedForm


@dataclass(frozen=True)
class RowCode:
    """The code of one table, and its inverse on the rank that owns base rows from ``first_row`` on."""

    config: CompositionalConfig

    def __post_init__(self) -> None:
        largest = self.config.bound_partitions.sizes[self.config.base_partition] * self.codes_per_row
        if largest >= 2**62:
            raise ValueError(
                f"table {self.config.name!r}: its ids need row codes up to {largest}; allowed: below 2^62 where rows "
                "are split; use another sharding type, or partitions of closed form"
            )

    @property
    def codes_per_row(self) -> int:
        """C."""
        p = self.config.bound_partitions
        if not isinstance(p, ClosedForm):
            return p.num_embeddings
        stride, size = self._base(p)
        return stride * -(-p.num_embeddings // (stride * size))

    def encode(self, ids: Tensor, class_map: Tensor | None) -> Tensor:
        """(N,) ids in [0, S) → (N,) int64 codes."""
        p = self.config.bound_partitions
        ids = ids.to(torch.int64)
        row = p.class_rows(ids, class_map)[self.config.base_partition]
        if not isinstance(p, ClosedForm):
            return row * self.codes_per_row + ids
        stride, size = self._base(p)
        return row * self.codes_per_row + ids % stride + stride * (ids // (stride * size))

    def layout(self, first_row: int) -> CodeLayout:
        """The inverse, of codes counted from ``first_row`` · C, as TorchRec's bucketizing leaves them."""
        p = self.config.bound_partitions
        stride, size = self._base(p) if isinstance(p, ClosedForm) else (0, 0)
        return CodeLayout(self.codes_per_row, stride, size, first_row)

    def _base(self, p: ClosedForm) -> tuple[int, int]:
        """M and r: stride and size of the base partition."""
        base = self.config.base_partition
        return p.strides[base], p.sizes[base]
