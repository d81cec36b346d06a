"""Fine-tuning from fitted partitions against training from new ones, on generated data."""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from torchrec_qr import QuotientRemainder, compress_

SIZES, DIM = {"user": 600, "item": 400}, 8
BATCH, SEEDS = 256, 4


class Preference(nn.Module):
    """A logit from the product of a user's and an item's row."""

    def __init__(self) -> None:
        super().__init__()
        self.collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=size, embedding_dim=DIM)
                for name, size in SIZES.items()
            ]
        )

    def forward(self, ids: Tensor) -> Tensor:
        users, items = self.collection(sparse(ids)).to_dict().values()
        return (users * items).sum(1)


def sparse(ids: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(list(SIZES), ids.T.reshape(-1), lengths=torch.ones(ids.numel(), dtype=torch.long))


def labelled(teacher: Callable[[Tensor], Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randint(size, (count,), generator=generator) for size in SIZES.values()], dim=1)
    return ids, torch.bernoulli(torch.sigmoid(teacher(ids)), generator=generator)


def trained(model: nn.Module, teacher: Callable[[Tensor], Tensor], steps: int, seed: int) -> float:
    """Trains a model on the teacher's labels, and returns its loss on others."""
    generator, loss = torch.Generator().manual_seed(seed), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for _ in range(steps):
        ids, labels = labelled(teacher, BATCH, generator)
        optimizer.zero_grad()
        loss(model(ids), labels).backward()
        optimizer.step()
    with torch.no_grad():
        ids, labels = labelled(teacher, 8_192, torch.Generator().manual_seed(99))
        return float(loss(model(ids), labels))


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["mult", "add"])
def test_a_fitted_start_beats_a_new_one_after_the_same_steps(operation: Any) -> None:
    """The gain is above three times the deviation over seeds of either, and above that of the fit alone."""
    torch.manual_seed(1)
    # Rows of the teacher are those of groups of ids, and some of their own, as after training on real data.
    rows = [1.2 * torch.randn(size // 20, DIM).repeat(20, 1) + 0.4 * torch.randn(size, DIM) for size in SIZES.values()]

    def teacher(ids: Tensor) -> Tensor:
        return (rows[0][ids[:, 0]] * rows[1][ids[:, 1]]).sum(1)

    full = Preference()
    trained(full, teacher, 1_000, seed=0)
    spec, new, tuned, untuned = QuotientRemainder(num_collisions=4), [], [], []
    for seed in range(1, SEEDS + 1):
        torch.manual_seed(seed)
        anew, fitted = copy.deepcopy(full), copy.deepcopy(full)
        compress_(anew, spec, operation=operation, min_rows=0)
        compress_(fitted, spec, operation=operation, min_rows=0, fit=True)
        untuned.append(trained(fitted, teacher, 0, seed))
        new.append(trained(anew, teacher, 60, seed))
        tuned.append(trained(fitted, teacher, 60, seed))
    deviation = max(statistics.stdev(new), statistics.stdev(tuned))
    assert statistics.fmean(new) - statistics.fmean(tuned) > 3 * deviation
    assert statistics.fmean(untuned) - statistics.fmean(tuned) > 3 * statistics.stdev(tuned)
