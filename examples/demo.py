"""Trains TorchRec's DLRM, on one CPU, with every large table replaced by a quotient-remainder table.

The rows are made here, in Criteo's form: 13 dense numbers and 26 category ids, and a label that depends on both.
"""

import math
import time

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder

DENSE, DIM, BATCH, STEPS = 13, 16, 1024, 200
ROWS = [100_000, 50_000, 20_000, 10_000, 5_000, 2_000] + [1_000] * 6 + [200] * 6 + [20] * 8
FEATURES = [f"cat_{i}" for i in range(len(ROWS))]
SMALL = 200  # tables of at most this many rows stay as they are


class Criteo:
    """Rows in Criteo's form, without end: ids follow Zipf's law, and each has an effect of its own on the label."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._dense_effect = torch.randn(DENSE, generator=self._random) / math.sqrt(DENSE)
        self._effects = [torch.randn(rows, generator=self._random) * 2 / math.sqrt(len(ROWS)) for rows in ROWS]

    def batch(self, size: int) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
        """Returns dense (B, 13), one id per feature and row, and labels (B,)."""
        dense = torch.randn(size, DENSE, generator=self._random)
        uniform = torch.rand(len(ROWS), size, generator=self._random, dtype=torch.float64)
        # S^u - 1 for uniform u has density ~ 1/(1 + x): Zipf's law with exponent 1.
        ids = torch.stack([(rows**u - 1).long() for rows, u in zip(ROWS, uniform, strict=True)])
        effects = torch.stack([effect[i] for effect, i in zip(self._effects, ids, strict=True)])
        labels = torch.bernoulli(torch.sigmoid(dense @ self._dense_effect + effects.sum(0)), generator=self._random)
        lengths = torch.ones(ids.numel(), dtype=torch.int64)
        return dense, KeyedJaggedTensor(keys=FEATURES, values=ids.flatten(), lengths=lengths), labels


def table(feature: str, rows: int) -> EmbeddingBagConfig:
    """Returns the config of a feature's table: as ever if it is small, else rows / 4 + 4 rows in place of all."""
    if rows <= SMALL:
        return EmbeddingBagConfig(name=f"t_{feature}", feature_names=[feature], num_embeddings=rows, embedding_dim=DIM)
    return CompositionalEmbeddingBagConfig(
        name=f"t_{feature}",
        feature_names=[feature],
        num_embeddings=rows,
        embedding_dim=DIM,
        partitions=QuotientRemainder(rows, num_collisions=4),
    )


def main() -> None:
    """Trains, and prints the loss, the compression and the AUC on rows not trained on."""
    torch.manual_seed(0)
    tables = [table(feature, rows) for feature, rows in zip(FEATURES, ROWS, strict=True)]
    stored = sum(getattr(config, "physical_rows", config.num_embeddings) for config in tables)
    print(f"tables: {sum(ROWS):,} logical rows, {stored:,} stored ({sum(ROWS) / stored:.1f}x fewer)")

    collection = CompositionalEmbeddingBagCollection(tables=tables)
    model = DLRM(collection, dense_in_features=DENSE, dense_arch_layer_sizes=[64, DIM], over_arch_layer_sizes=[64, 1])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    data, start = Criteo(), time.perf_counter()
    for step in range(1, STEPS + 1):
        dense, sparse, labels = data.batch(BATCH)
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sparse).squeeze(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}  {step * BATCH / (time.perf_counter() - start):,.0f} rows/s")

    with torch.no_grad():
        dense, sparse, labels = data.batch(20_000)
        auc = binary_auroc(model(dense, sparse).squeeze(1), labels.long())
    print(f"AUC on 20,000 held-out rows: {auc.item():.4f}")


if __name__ == "__main__":
    main()
