"""Sharded pooled collections train as the unsharded float64 reference does, whatever the plan and the world size.

`tests/cuda_without_gpu/test_waits.py` also trains tables of every data type and policy under every sharding type.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pairwise import all_pairs, pairs_of, pairwise
from parity_model import (
    NOT_PLAIN,
    ROW_SPLIT,
    Run,
    TableCase,
    Trained,
    hand_plan,
    one_of_each,
    shard_run,
    train,
)
from parity_reference import assert_trained_as_reference
from pieces import assembled
from placements import SHARDINGS
from ranks import run_ranks
from sharded_model import Model, distributed
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from varied_runs import possible, tables_of

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": (
        ("hash", 1),
        ("strided", 2),
        ("adjacent", 2),
        ("explicit", 2),
        ("chinese_remainder", 3),
        ("explicit", 3),
        ("mixed_radix", 4),
    ),
    "sharding": SHARDINGS,
    "operation": ("mult", "add", "concat", "path"),
    "optimizer": ("sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad"),
    "pooling": ("sum", "mean"),
    "plan": ("planner", "hand"),
    "weighted": (False, True),
    "world_size": (2, 4),
    "hash_seed": (None, 9),
}


PLAIN = (TableCase("plain_tw", "plain", "table_wise"), TableCase("plain_cw", "plain", "column_wise"))


def runs_of(cases: list[dict[str, Any]], pooled: bool = True) -> dict[tuple[int, str, bool], Run]:
    """One collection for all cases that share world size, optimizer and weighting; with plain tables where they can."""
    runs = {}
    for (world_size, optimizer, weighted), tables in tables_of(cases, "world_size", "optimizer", "weighted").items():
        plain = () if optimizer in NOT_PLAIN else PLAIN
        runs[world_size, optimizer, weighted] = Run((*plain, *tables), optimizer, weighted, pooled)
    return runs


CASES = pairwise(FACTORS, possible)
RUNS = runs_of(CASES)


def test_every_pair_of_values_occurs() -> None:
    assert set(all_pairs(FACTORS, possible)) == {pair for case in CASES for pair in pairs_of(case, FACTORS)}
    assert len(CASES) < 80
    assert sum(table.kind != "plain" for run in RUNS.values() for table in run.tables) == len(CASES)


@pytest.mark.parametrize("key", RUNS, ids=str)
def test_trains_as_reference(key: tuple[int, str, bool]) -> None:
    assert_trained_as_reference(RUNS[key], run_ranks(train, key[0], RUNS[key], local_world_size=2))


MIXED = (
    # f0 in a row-wise, a table-wise and a plain table; several features per table; D differs.
    TableCase("rw", "strided", "row_wise", features=("f0", "f1"), operation="add", dim=8),
    TableCase("tw", "explicit", "table_wise", features=("f2", "f0"), pooling="mean"),
    TableCase("plain", "plain", "table_wise", features=("f0", "f3"), dim=12),
    TableCase("cw", "chinese_remainder", "column_wise", k=3, operation="concat", features=("f3", "f1"), plan="hand"),
    TableCase("dp", "adjacent", "data_parallel", features=("f2", "f1"), dim=4),
    TableCase("twrw", "hash", "table_row_wise", k=1, operation="concat", features=("f4", "f0"), dim=32),
    TableCase("grid", "mixed_radix", "grid_shard", operation="mult", features=("f1",), pooling="mean"),
    TableCase("path", "strided", "row_wise", operation="path", features=("f0", "f4"), dim=8),
)


def test_shared_features_and_dims() -> None:
    """Features shared by tables of all sharding types, tables of several features and dims."""
    run = Run(MIXED, optimizer="adagrad")
    assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))


def test_world_sizes_agree() -> None:
    """1, 2 and 4 ranks give the outputs and weights of one reference, for the same batch of int32 ids and lengths."""
    run = Run((*MIXED, *one_of_each(operation="mult")), optimizer="adagrad", weighted=True, int32=True)
    for world_size in (1, 2, 4):
        assert_trained_as_reference(run, run_ranks(train, world_size, run, local_world_size=min(world_size, 2)))


def test_weighted_mean_under_every_sharding_type() -> None:
    """Divided by the number of ids of a bag, not by the sum of its weights, beside tables that are not divided."""
    plain = (replace(t, name=f"{t.name}_plain") for t in one_of_each(ROW_SPLIT, kind="plain", pooling="mean"))
    tables = (*one_of_each(pooling="mean"), *(replace(t, name=f"{t.name}_sum") for t in one_of_each()), *plain)
    run = Run(tables, optimizer="adagrad", weighted=True)
    for world_size in (2, 4):
        assert_trained_as_reference(run, run_ranks(train, world_size, run, local_world_size=2))


def test_more_ranks_than_base_rows() -> None:
    tables = (
        *one_of_each(kind="tiny"),
        TableCase("add", "tiny", "row_wise", operation="add", plan="hand"),
        TableCase("path", "tiny", "row_wise", operation="path"),
    )
    run = Run(tables, optimizer="rowwise_adagrad")
    assert_trained_as_reference(run, run_ranks(train, 4, run, local_world_size=2))


@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad", "amsgrad"])
def test_path_wider_than_the_kernels_rows(optimizer: str) -> None:
    """With D=16 and 32 hidden units an MLP has 2·16·32 + 32 + 16 = 1,072 parameters, all in one row."""
    shardings = ("table_wise", "row_wise", "data_parallel")
    run = Run(one_of_each(shardings, operation="path", hidden=32), optimizer=optimizer)
    assert_trained_as_reference(run, run_ranks(train, 2, run))


def raised(rank: int, world_size: int, run: Run) -> str:
    dmp = shard_run(run)
    batch = run.batch(0)
    batch.ids[f"f_{run.tables[0].name}"][0] = [100]
    with pytest.raises(IndexError) as error:
        dmp(batch.kjt(weighted=False))
    return str(error.value)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_out_of_range_error_names_the_id(sharding: str) -> None:
    """All ranks have the same bad batch here: every one raises, before it communicates."""
    (message,) = run_ranks(raised, 1, Run(one_of_each((sharding,))))
    assert f"table '{sharding}', feature 'f_{sharding}': id 100 is outside [0, 100)" in message


def test_replicated_parameters_stay_identical_over_20_steps() -> None:
    """`assembled` compares bit for bit what several ranks hold."""
    replicated = ("row_wise", "table_row_wise", "grid_shard", "data_parallel")
    tables = (
        *one_of_each(replicated),
        *(TableCase(f"{s}_3", "mixed_radix", s, k=3, operation="add", pooling="mean") for s in replicated),
        TableCase("path", "strided", "data_parallel", operation="path"),
    )
    run = Run(tables, optimizer="adagrad", weighted=True, steps=20)
    ranks: list[Trained] = run_ranks(train, 4, run, local_world_size=2)
    initial = run.initial().state_dict()
    for key, value in assembled([r.state for r in ranks]).items():
        assert not torch.equal(value, initial[key.removeprefix("collection.")].double()), key
    assembled([r.optimizer_state for r in ranks])


def input_weight_gradients(rank: int, world_size: int) -> dict[str, bool]:
    """Whether the batch's weights get a gradient: stock and ours, per sharding type."""
    run = Run(one_of_each(), weighted=True)
    out = {"ours": _has_weight_gradient(shard_run(run), run)}
    plain = Run(tuple(TableCase(s, "plain", s) for s in ("table_wise", "column_wise", "row_wise")), weighted=True)
    stock = EmbeddingBagCollection(tables=plain.configs(), is_weighted=True)
    sharder = EmbeddingBagCollectionSharder()
    plan = hand_plan(stock, list(plain.tables), sharder)
    out["stock"] = _has_weight_gradient(distributed(Model(stock), plan, [sharder]), plain)
    out["unsharded"] = _has_weight_gradient(Model(run.initial()), run)
    return out


def _has_weight_gradient(model: Callable[..., Any], run: Run) -> bool:
    kjt = run.batch(0).kjt(weighted=True)
    weights = kjt.weights().requires_grad_()
    model(kjt).sum().backward()
    return weights.grad is not None


def test_input_weights_get_a_gradient_where_torchrec_gives_one() -> None:
    """Unsharded, weights are differentiable (values: `tests/test_parity.py`). Sharded, TorchRec distributes the batch
    under ``no_grad``, so the weights of a sharded collection, stock or ours, are data and get none."""
    for out in run_ranks(input_weight_gradients, 2):
        assert out == {"ours": False, "stock": False, "unsharded": True}
