"""Compresses a trained DLRM in place, from the rows of its full tables, and fine-tunes it at a tenth of the rate.

Run: python examples/fine_tuned.py
It prints bytes of tables and log loss of other rows: trained, compressed, fine-tuned, and from new partitions instead.
"""

import copy

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_qr import QuotientRemainder, compress_

SIZES, DIM, BATCH = {"user": 20_000, "item": 5_000}, 16, 1024
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TASTES = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in SIZES.values()]


def generated_batch(count: int, seed: int) -> Batch:
    """Returns rows of a user and an item, often of frequent ones, and of a click that the tastes of both explain."""
    random = torch.Generator().manual_seed(seed)
    ids = [(size ** torch.rand(count, generator=random)).long() - 1 for size in SIZES.values()]
    clicks = torch.bernoulli(torch.sigmoid(TASTES[0][ids[0]] + TASTES[1][ids[1]]), generator=random)
    features = KeyedJaggedTensor(list(SIZES), torch.cat(ids), lengths=torch.ones(2 * count, dtype=torch.int64))
    return Batch(torch.zeros(count, 1), features, clicks).to(DEVICE)


def train(model: DLRMTrain, steps: range, lr: float) -> None:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=lr)  # new each time, because compress_ makes new parameters
    for step in steps:
        optimizer.zero_grad()
        model(generated_batch(BATCH, seed=step))[0].backward()
        optimizer.step()


def loss_of(name: str, model: DLRMTrain) -> float:
    with torch.no_grad():
        loss = model(generated_batch(50_000, seed=1_000))[0].item()
    print(f"{name}: {sum(weight.nbytes for weight in model.model.sparse_arch.parameters()):,} bytes, loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(S, DIM, f"t_{f}", feature_names=[f]) for f, S in SIZES.items()]
    model = DLRMTrain(DLRM(EmbeddingBagCollection(tables=tables), 1, [DIM], [32, 1])).to(DEVICE)
    train(model, range(300), lr=0.05)
    full, new = loss_of("full tables", model), copy.deepcopy(model)
    print(compress_(model, QuotientRemainder(num_collisions=4), fit=True))
    compressed = loss_of("compressed", model)
    train(model, range(300, 400), lr=0.005)
    assert full < loss_of("fine-tuned", model) < compressed < 1.03 * full
    compress_(new, QuotientRemainder(num_collisions=4))
    train(new, range(300, 400), lr=0.05)
    loss_of("from new partitions", new)
