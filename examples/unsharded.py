"""Trains a DLRM with full, quotient-remainder and hashed tables, and compares their memory and quality.

Run: python examples/unsharded.py
It prints MiB of the tables, and log loss and AUC of rows that no model has seen. Ids share embeddings if hashed alone.
"""

import torch
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain

import torchrec_qr
from torchrec_qr import CompositionalEmbeddingBagConfig, HashPartition, QuotientRemainder

SIZES, DIM, BATCH, STEPS = {"user": 100_000, "item": 20_000}, 16, 1024, 200
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASTES = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in SIZES.values()]


def generated_batch(count: int, seed: int) -> Batch:
    """Returns rows of a user and an item, often of frequent ones, and of a click that the tastes of both explain."""
    random = torch.Generator().manual_seed(seed)
    ids = [(size ** torch.rand(count, generator=random)).long() - 1 for size in SIZES.values()]
    dense = torch.randn(count, 1, generator=random)
    logits = TASTES[0][ids[0]] + TASTES[1][ids[1]] + 0.3 * dense[:, 0]
    clicks = torch.bernoulli(torch.sigmoid(logits), generator=random)
    features = KeyedJaggedTensor(list(SIZES), torch.cat(ids), lengths=torch.ones(2 * count, dtype=torch.int64))
    return Batch(dense, features, clicks).to(DEVICE)


def auc_of(name: str, config: type[EmbeddingBagConfig], **partitions: QuotientRemainder | HashPartition) -> float:
    torch.manual_seed(0)
    tables = [config(S, DIM, f"t_{f}", feature_names=[f], **partitions) for f, S in SIZES.items()]
    ebc = torchrec_qr.CompositionalEmbeddingBagCollection(tables=tables)
    dlrm = DLRM(ebc, dense_in_features=1, dense_arch_layer_sizes=[DIM], over_arch_layer_sizes=[32, 1])
    model = DLRMTrain(dlrm).to(DEVICE)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, _ = model(generated_batch(BATCH, seed=step))
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        loss, (_, logits, labels) = model(generated_batch(50_000, seed=STEPS))
    mib = sum(weight.nbytes for weight in ebc.parameters()) / 2**20
    auc = binary_auroc(logits, labels.long()).item()
    print(f"{name}: {mib:.2f} MiB, log loss {loss:.3f}, AUC {auc:.3f}")
    return auc


if __name__ == "__main__":
    full = auc_of("full tables", EmbeddingBagConfig)
    for m in (4, 16):
        qr, hashing = QuotientRemainder(num_collisions=m), HashPartition(compression=m)
        own = auc_of(f"quotient-remainder, 1/{m}", CompositionalEmbeddingBagConfig, partitions=qr)
        shared = auc_of(f"hashed, 1/{m}", CompositionalEmbeddingBagConfig, partitions=hashing)
        assert shared < own < full
