"""Numbers of the examples' page, which the scripts print, follow from sizes or from an independent computation."""

import re
from pathlib import Path

import pytest
import torch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad

from examples import sharded, unsharded
from torchrec_qr import CompositionalEmbeddingBagCollection, CompositionalEmbeddingBagConfig, QuotientRemainder

PAGE = (Path(__file__).parents[2] / "examples" / "README.md").read_text()


def numbers(line: str) -> list[float]:
    """Returns the numbers that the page has for the groups of a pattern."""
    found = re.search(line, PAGE)
    assert found is not None, line
    return [float(group.replace(",", "")) for group in found.groups()]


def mib(rows: int, columns: int) -> float:
    return rows * columns * 4 / 2**20


def test_bytes_are_those_of_the_rows() -> None:
    for name, rows in {
        "full tables": 100_000 + 20_000,
        "quotient-remainder, 1/4": 25_000 + 4 + 5_000 + 4,
        "hashed, 1/4": 25_000 + 5_000,
        "quotient-remainder, 1/16": 6_250 + 16 + 1_250 + 16,
        "hashed, 1/16": 6_250 + 1_250,
    }.items():
        assert numbers(rf"{name}: (\d\.\d\d) MiB") == [round(mib(rows, 16), 2)]
    assert numbers(r"full tables: ([\d,]+) bytes") == [25_000 * 16 * 4]
    assert numbers(r"compressed: ([\d,]+) bytes") == [(5_000 + 4 + 1_250 + 4) * 16 * 4]
    assert numbers(r"t_user .* ([\d,.]+) +100\.00  mult of") == [round(mib(30_000_000 + 100, 128), 3)]
    # Rows of int8 have 4 bytes of scale and bias. Each table has a fingerprint of 12 integers.
    rows = 10_000 + 100 + 1_000 + 100
    assert numbers(r"bytes: ([\d,]+) as floats, ([\d,]+) as int8") == [rows * 256 + 192, rows * 68 + 192]


def test_quality_lies_between_chance_and_what_the_tastes_allow() -> None:
    """AUC is the share of pairs of a click and none in which the click scores higher."""
    batch = unsharded.generated_batch(4_000, seed=unsharded.STEPS)
    users, items = batch.sparse_features.values().view(2, -1)
    known = unsharded.TASTES[0][users] + unsharded.TASTES[1][items] + 0.3 * batch.dense_features[:, 0]
    clicked = batch.labels.bool()
    best = (known[clicked][:, None] > known[~clicked]).float().mean().item()
    aucs = [float(auc) for auc in re.findall(r"AUC (\d\.\d+)", PAGE)]
    assert len(aucs) == 5
    assert 0.7 < min(aucs) < max(aucs) < best < 0.85


@pytest.mark.slow
def test_sharded_losses_are_those_of_one_process_on_the_rows_of_both_ranks() -> None:
    """Other initial values move the first losses, and the last ones by less than 0.001 over five seeds."""
    torch.manual_seed(5)
    tables = [
        CompositionalEmbeddingBagConfig(
            name=f"t_{feature}",
            feature_names=[feature],
            num_embeddings=size,
            embedding_dim=sharded.DIM,
            partitions=QuotientRemainder(num_collisions=4),
        )
        for feature, size in sharded.SIZES.items()
    ]
    ebc = CompositionalEmbeddingBagCollection(tables=tables)
    model = DLRMTrain(DLRM(ebc, 1, [sharded.DIM], [32, 1]))
    of_tables = list(ebc.parameters())
    others = [p for p in model.parameters() if not any(p is weight for weight in of_tables)]
    optimizers = [RowWiseAdagrad(of_tables, lr=0.05), torch.optim.Adagrad(others, lr=0.05)]
    losses = []
    for step in range(sharded.STEPS):
        loss = torch.stack([model(sharded.generated_batch(2 * step + rank))[0] for rank in range(2)]).mean()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    stated = numbers(r"log loss of the first 20 steps (\d\.\d+), of the last 20 (\d\.\d+)")
    assert stated[0] == pytest.approx(sum(losses[:20]) / 20, abs=0.03)
    assert stated[1] == pytest.approx(sum(losses[-20:]) / 20, abs=0.002)
