"""The hashing trick."""

from dataclasses import dataclass

from torchrec_qr.partitions.bound import ClosedForm
from torchrec_qr.partitions.checks import checked_budget, checked_num_embeddings
from torchrec_qr.partitions.spec import PartitionSpec


@dataclass(frozen=True, kw_only=True)
class HashPartition(PartitionSpec):
    """The hashing trick: one partition, p(x) = x % R, of R rows (arXiv:1909.02107, algorithm 1).

    Not complementary if R < S: about S / R ids share an embedding. A baseline.

    Args:
        rows (int | None): R, or S if that is less.
        compression (float | None): R = ⌊S / compression⌋; at least 1 and at most S.

    Raises:
        ValueError: no size or both are given.

    Example:
        >>> import torch
        >>> hashed = HashPartition(rows=4).bind(10)
        >>> hashed.rows(torch.tensor([3, 7, 9])).tolist(), hashed.is_complementary()
        ([[3], [3], [1]], False)
        >>> HashPartition(compression=4.0).bind(100).sizes
        (25,)
    """

    kind = "hash"

    rows: int | None = None
    compression: float | None = None

    def __post_init__(self) -> None:
        self._check_sized_once(("rows", "compression"))

    def bind(self, num_embeddings: int) -> ClosedForm:
        owner = type(self).__name__
        s = checked_num_embeddings(owner, num_embeddings)
        rows = checked_budget(owner, s, self.rows, self.compression)
        if rows < 1:
            if self.compression is not None:
                raise ValueError(f"{owner}: compression must be at most num_embeddings ({s}), got {self.compression}")
            raise ValueError(f"{owner}: rows must be at least 1, got {rows}")
        return ClosedForm(s, (min(rows, s),), (1,))
