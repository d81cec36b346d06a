"""Kinds of partitions, each with the oracle's description of the same. Needs neither TorchRec nor Hypothesis."""

from dataclasses import dataclass

import oracle
import torch

from torchrec_qr import (
    ChineseRemainder,
    ExplicitPartitions,
    HashPartition,
    MixedRadix,
    QuotientRemainder,
)
from torchrec_qr.partitions import BoundPartitions, PartitionSpec

COPRIME = {1: [101], 2: [11, 10], 3: [5, 7, 3], 4: [3, 5, 7, 2]}
RADIX = {1: [101], 2: [12, 9], 3: [6, 5, 4], 4: [4, 3, 3, 3]}


@dataclass(frozen=True)
class Kind:
    """One kind of partitions over ids [0, num_ids), in the library's words and in the oracle's."""

    label: str
    partitions: PartitionSpec
    num_embeddings: int
    rows_of: oracle.RowsOf
    hash_seed: int | None = None

    def hashed(self, seed: int) -> "Kind":
        """The same partitions of ids that are hashed."""
        rows_of = oracle.hashed(self.rows_of, self.num_embeddings, seed)
        return Kind(self.label, self.partitions, self.num_embeddings, rows_of, seed)

    @property
    def bound(self) -> BoundPartitions:
        return self.partitions.bind(self.num_embeddings)


def kind_of(label: str, k: int, num_ids: int = 100) -> Kind:
    """Kinds that exist for K partitions only; `num_ids` up to 100."""
    if label == "hash":
        return Kind(label, HashPartition(rows=17), num_ids, lambda x: (x % 17,))
    if label in ("strided", "adjacent"):
        return Kind(
            label,
            QuotientRemainder(num_collisions=7, grouping=label),
            num_ids,
            oracle.quotient_remainder(num_ids, 7, label),
        )
    if label == "mixed_radix":
        return Kind(label, MixedRadix(sizes=RADIX[k]), num_ids, oracle.mixed_radix(RADIX[k]))
    if label == "chinese_remainder":
        return Kind(label, ChineseRemainder(sizes=COPRIME[k]), num_ids, oracle.chinese_remainder(COPRIME[k]))
    classes = [[oracle.mixed_radix(RADIX[k])((37 * x + 11) % num_ids)[j] for x in range(num_ids)] for j in range(k)]
    return Kind("explicit", ExplicitPartitions(torch.tensor(classes)), num_ids, oracle.explicit(classes))
