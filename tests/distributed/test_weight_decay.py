"""Ten steps of each optimizer with weight decay, partial rowwise Adam and LAMB, under every placement."""

import pytest
import torch
from parity_model import Run, TableCase, one_of_each, shard_run, train
from parity_reference import Reference, assert_trained_as_reference
from pieces import Pieces, assembled
from placements import SHARDINGS
from ranks import run_ranks
from sharded_model import LR, own_weights

TABLES = (
    *one_of_each(),
    *(TableCase(f"add_{s}", "mixed_radix", s, k=3, operation="add", pooling="mean", plan="hand") for s in SHARDINGS),
    *(TableCase(f"concat_{s}", "chinese_remainder", s, k=3, operation="concat", plan="hand") for s in SHARDINGS),
    TableCase("path", "strided", "row_wise", operation="path"),
)
HALF = tuple(
    TableCase(f"{data_type}_{s}", "strided", s, data_type=data_type)
    for data_type in ("FP16", "BF16")
    for s in ("table_wise", "row_wise", "data_parallel")
)
RULES = [
    *((name, mode) for name in ("sgd", "adagrad", "rowwise_adagrad") for mode in ("l2", "decoupled")),
    *((name, "decoupled") for name in ("adam", "amsgrad", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "mode"), RULES)
def test_ten_steps_under_every_placement(optimizer: str, mode: str) -> None:
    run = Run(TABLES, optimizer, steps=10, bags=4, weight_decay=0.3, mode=mode)
    assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "partial_rowwise_adam", "lamb"])
def test_storage_in_16_bits(optimizer: str) -> None:
    run = Run(HALF, optimizer, weight_decay=0.3, mode="decoupled")
    assert_trained_as_reference(run, run_ranks(train, 2, run))


def test_lamb_under_the_placements_of_two_ranks() -> None:
    run = Run(one_of_each(("column_wise", "row_wise", "data_parallel"), plan="hand"), "partial_rowwise_lamb")
    assert_trained_as_reference(run, run_ranks(train, 2, run))


def stepped_without_gradient(rank: int, world_size: int, run: Run) -> dict[str, Pieces]:
    dmp = shard_run(run)
    (0.0 * dmp(run.own_batch(0)).sum()).backward()
    return own_weights(dmp)


def test_rows_that_are_looked_up_decay_without_a_gradient_and_no_others() -> None:
    run = Run(one_of_each(), weight_decay=0.5, mode="decoupled")
    weights = assembled(run_ranks(stepped_without_gradient, 2, run))
    reference, initial = Reference(run), run.initial().state_dict()
    for case in run.tables:
        table = reference.tables[case.name]
        for j in range(case.k):
            key = f"collection.embedding_bags.{case.name}.partition_{j}.weight"
            expected = initial[key.removeprefix("collection.")].double()
            ids = {x for bag in run.batch(0).ids[f"f_{case.name}"] for x in bag}
            rows = sorted({table.rows_of(x)[j] for x in ids})
            expected[rows] *= 1 - LR * 0.5
            torch.testing.assert_close(weights[key], expected, rtol=1e-6, atol=0, msg=key)
            if j == 0:
                assert len(rows) < len(expected)
