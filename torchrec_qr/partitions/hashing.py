"""The hashing trick."""

from torchrec_qr.partitions.base import ClosedForm
from torchrec_qr.partitions.validation import MAX_NUM_IDS, checked_between, checked_num_ids, rows_of_ratio


class HashPartition(ClosedForm):
    """The hashing trick: one partition, p(x) = x % num_rows (arXiv:1909.02107, algorithm 1).

    Not complementary unless `num_rows` >= S: about S / num_rows ids share an embedding. A baseline.

    Args:
        num_ids: S, at most 2^40.
        num_rows: the rows of the one table, R; `sizes` is `(num_rows,)`.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument lies outside [1, 2^40].

    >>> import torch
    >>> hashed = HashPartition(10, num_rows=4)
    >>> hashed.rows(torch.tensor([3, 7, 9])).tolist(), hashed.is_complementary()
    ([[3], [3], [1]], False)
    """

    kind = "hash"

    def __init__(self, num_ids: int, num_rows: int) -> None:
        size = checked_between(type(self).__name__, "num_rows", num_rows, 1, MAX_NUM_IDS, " (2^40)")
        super().__init__(num_ids, (size,), (1,))

    @classmethod
    def for_budget(cls, num_ids: int, rows: int) -> "HashPartition":
        """As many rows as the budget allows, and no more than ids: min(rows, S).

        >>> HashPartition.for_budget(100, rows=30)
        HashPartition(num_ids=100, num_rows=30)
        """
        num_ids = checked_num_ids(cls.__name__, num_ids)
        return cls(num_ids, min(checked_between(cls.__name__, "rows", rows, 1, None), num_ids))

    @classmethod
    def for_compression(cls, num_ids: int, ratio: float) -> "HashPartition":
        """`for_budget` with ⌊S / ratio⌋ rows, ratio >= 1.

        >>> HashPartition.for_compression(100, ratio=4.0)
        HashPartition(num_ids=100, num_rows=25)
        """
        rows = rows_of_ratio(cls.__name__, num_ids, ratio)
        if rows < 1:
            raise ValueError(f"{cls.__name__}: ratio must be at most num_ids ({num_ids}), got {ratio}")
        return cls.for_budget(num_ids, rows)

    def is_complementary(self) -> bool:
        return self.num_rows >= self.num_ids

    def describe(self) -> dict[str, object]:
        return {"num_rows": self.num_rows}
