"""The partition of the hashing trick."""

from dataclasses import dataclass

from torchrec_qr.partitions.bound import ClosedForm
from torchrec_qr.partitions.checks import checked_budget, checked_num_embeddings
from torchrec_qr.partitions.spec import PartitionSpec


@dataclass(frozen=True, kw_only=True)
class HashPartition(PartitionSpec):
    """The hashing trick: one partition, p(x) = x % R, of R rows (arXiv:1909.02107, algorithm 1).

    It is a baseline, and not complementary if R < S: about S / R ids share an embedding.

    Args:
        rows (int | None): R, of which at most S are used.
        compression (float | None): R = ⌊S / compression⌋, for a compression between 1 and S.

    Raises:
        ValueError: not exactly one size is given.

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
