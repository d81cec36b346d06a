"""2D parallelism: groups of ranks train apart, and ``sync()`` averages their tables and optimizers."""

from itertools import product
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from global_batches import Batch
from groups_of_ranks import GROUP_SIZE, place_of, shard_run_in_groups, train_in_groups
from near import assert_near
from parity_model import NOT_PLAIN, OPTIMIZERS, Run, TableCase, Trained, one_of_each, parts_of, train
from parity_reference import ROUNDED, Reference
from pieces import Pieces, assembled
from placements import BASIC_SHARDINGS, SHARDINGS
from ranks import run_ranks
from sharded_model import own_weights
from torchrec.distributed.types import ShardingStrategy

from torchrec_qr.distributed import optimizer_of_each_parameter

STEPS = [0, 1, 2]
# The batches of each group, and the steps after which groups are averaged: not the first one.
STEPS_APART = (STEPS, [3, 4, 5])
SYNCED = (1, 2)
BY_HAND: dict[str, Any] = {"plan": "hand"}
PLAIN = (
    TableCase("plain_tw", "plain", "table_wise", **BY_HAND),
    TableCase("plain_cw", "plain", "column_wise", **BY_HAND),
)
MORE = (
    TableCase("fp16", "strided", "row_wise", data_type="FP16", **BY_HAND),
    TableCase("tiny", "tiny", "row_wise", **BY_HAND),
    TableCase("concat", "explicit", "column_wise", k=3, operation="concat", **BY_HAND),
    TableCase("path", "strided", "row_wise", operation="path", pooling="mean", **BY_HAND),
)


def run_of(optimizer: str, pooled: bool = True) -> Run:
    plain = () if optimizer in NOT_PLAIN else PLAIN
    tables = one_of_each(SHARDINGS if pooled else BASIC_SHARDINGS, plan="hand")
    return Run((*plain, *tables, *MORE), optimizer, pooled=pooled)


def apart(rank: int, world_size: int, run: Run, inter_host: bool) -> tuple[tuple[int, int], Trained]:
    dmp = shard_run_in_groups(run, inter_host)
    return place_of(dmp), train_in_groups(run, dmp, STEPS_APART, SYNCED)


def both(of_groups: list[Batch]) -> Batch:
    """The samples of both groups in one batch."""
    first, second = of_groups
    return Batch(
        {f: bags + second.ids[f] for f, bags in first.ids.items()},
        {f: bags + second.weights[f] for f, bags in first.weights.items()},
    )


def assert_as_defined(run: Run, ranks: list[tuple[tuple[int, int], Trained]]) -> None:
    """Each group's tables are those of the group's data, averaged where ``sync()`` was called.

    Data-parallel tables step by the mean gradient of the groups, which all ranks reduce at every step.
    """
    trained = dict(ranks)
    columns = ranks[0][1].columns
    references, of_all = [Reference(run, columns) for _ in range(2)], Reference(run, columns)
    replicated = {f"f_{t.name}" for t in run.tables if t.sharding == "data_parallel"}
    of_all.loss_scale = 0.5
    for i, steps in enumerate(zip(*STEPS_APART, strict=True)):
        batches = [run.batch(step) for step in steps]
        for group, (reference, batch) in enumerate(zip(references, batches, strict=True)):
            for r, out in enumerate(reference.step(batch, GROUP_SIZE)):
                parts = parts_of(run, batch.part(r, GROUP_SIZE), out)
                for name in parts.keys() - replicated:
                    found = torch.from_numpy(trained[group, r].outputs[name][i])
                    assert_near(
                        found, parts[name], 4e-3 if "fp16" in name else 1e-5, f"step {i}, group {group}: {name}"
                    )
        of_all.step(both(batches))
        if i in SYNCED:
            references[0].average_with(references[1])
    # Groups have the same values bit for bit, or this raises.
    found = {name: assembled([getattr(t, name) for t in trained.values()]) for name in ("state", "optimizer_state")}
    for reference in (references[0], of_all):
        for name, exact in (("state", reference.weights()), ("optimizer_state", reference.optimizer_state())):
            for key, case, value in exact:
                if (case.sharding == "data_parallel") == (reference is not of_all):
                    continue
                assert_near(found[name].pop(key), value, ROUNDED[case.data_type], key)
    assert found == {"state": {}, "optimizer_state": {}}


# Every optimizer with and without pooling; the ranks of groups and the hosts of 1 or 2 ranks vary along.
CASES = [
    (optimizer, pooled, bool(i % 2), 1 + i // 2 % 2)
    for i, (pooled, optimizer) in enumerate(
        product((True, False), ("adagrad", *(o for o in OPTIMIZERS if o != "adagrad")))
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "pooled", "inter_host", "local_size"), CASES)
def test_sync_averages_what_the_groups_have_trained(
    optimizer: str, pooled: bool, inter_host: bool, local_size: int
) -> None:
    run = run_of(optimizer, pooled)
    assert_as_defined(run, run_ranks(apart, 4, run, inter_host, local_world_size=local_size))


def test_sync_averages_a_table_of_each_basic_sharding_type() -> None:
    run = Run((*PLAIN[:1], *one_of_each(BASIC_SHARDINGS, **BY_HAND)), "adagrad")
    assert_as_defined(run, run_ranks(apart, 4, run, False, local_world_size=1))


def alike(rank: int, world_size: int, run: Run, inter_host: bool) -> Trained:
    return train_in_groups(run, shard_run_in_groups(run, inter_host), (STEPS, STEPS), (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "pooled", "inter_host"), [("rowwise_adagrad", True, False), ("adam", False, True)]
)
def test_groups_of_the_same_data_train_as_one_group(optimizer: str, pooled: bool, inter_host: bool) -> None:
    run = run_of(optimizer, pooled)
    ranks = run_ranks(alike, 4, run, inter_host, local_world_size=2)
    alone = run_ranks(train, 2, run, local_world_size=2)
    for name in ("state", "optimizer_state"):
        found, expected = (assembled([getattr(rank, name) for rank in of]) for of in (ranks, alone))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if ".data_parallel." in key:
                # All four ranks sum its gradients, in another order.
                assert_near(found[key], value, 1e-6, key)
            else:
                assert torch.equal(found[key], value), key


def initial_values(rank: int, world_size: int) -> dict[str, Pieces]:
    run = run_of("adagrad")
    torch.manual_seed(rank)
    dmp = shard_run_in_groups(run, values=False)
    assert set(optimizer_of_each_parameter(dmp, []).values()) == {"fused Adagrad"}
    return own_weights(dmp)


def test_groups_start_with_the_same_values() -> None:
    """Or ``sync()`` would average other values, and make them smaller."""
    values = assembled(run_ranks(initial_values, 4, local_world_size=1))
    assert all(bool(value.ne(0).any()) for value in values.values())


def one(kind: str, sharding: str) -> TableCase:
    return TableCase("t", kind, sharding, **BY_HAND)


COUNTED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay_mode": WeightDecayMode.COUNTER}
# A table, arguments of `shard_run_in_groups`, its fused optimizer, and the error.
REFUSED: list[tuple[TableCase, dict[str, Any], dict[str, Any], str]] = [
    (
        one("strided", "table_wise"),
        {"sharding_strategy": ShardingStrategy.FULLY_SHARDED},
        {},
        "ShardingStrategy.FULLY_SHARDED of DMPCollection is not supported by collections of torchrec_qr; allowed: "
        "ShardingStrategy.DEFAULT, ShardingStrategy.PER_MODULE",
    ),
    (
        one("strided", "row_wise"),
        {"kernel": "dense"},
        {},
        "compute kernel 'dense' is not supported under DMPCollection, whose sync() does not average it; "
        "allowed: fused, fused_uvm, or data_parallel",
    ),
    (one("plain", "column_wise"), {"kernel": "dense"}, {}, "compute kernel 'dense' is not supported under"),
    (one("plain", "table_wise"), {"kernel": "fused_uvm_caching"}, {}, "compute kernel 'fused_uvm_caching' is not"),
    (
        one("plain", "table_wise"),
        {},
        {"optimizer": EmbOptimType.ADAM},
        "optimizer=adam, weight_decay_mode=NONE of a",
    ),
    (one("plain", "table_wise"), {}, COUNTED, "weight_decay_mode=COUNTER of a plain"),
    (one("strided", "row_wise"), {"ranks": 4}, {}, "allowed: a plan for 2 ranks, as by a planner with a topology of"),
]


def refusals(rank: int, world_size: int) -> list[str]:
    messages = []
    for table, arguments, fused_params, _ in REFUSED:
        run = Run((table,))
        with pytest.raises((NotImplementedError, ValueError)) as error:
            shard_run_in_groups(run, sharders=run.sharders(fused_params), values=False, **arguments)
        messages.append(str(error.value))
    return messages


def test_what_sync_would_pass_over_is_refused_on_every_rank() -> None:
    for messages in run_ranks(refusals, 4, local_world_size=1):
        for message, (_, _, _, expected) in zip(messages, REFUSED, strict=True):
            assert message.startswith("table 't': ")
            assert expected in message
