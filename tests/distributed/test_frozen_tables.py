"""A frozen table keeps its rows and its optimizer state, wherever they lie, and the others train as they would."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from ranks import run_ranks
from sharded_model import (
    ADAGRAD,
    ROWWISE,
    SGD,
    Model,
    plain_named,
    shard,
    state_of,
    table,
    train,
    unsharded,
    weights_of,
)
from torch import Tensor
from torchrec.distributed.sharding_plan import table_wise

from torchrec_qr import MixedRadix, QuotientRemainder
from torchrec_qr.distributed import optimizer_of_each_parameter
from torchrec_qr.ops.cpu_library import without_kernels

STEPS = range(3)


def configs() -> list[Any]:
    """A frozen table for each way to be stepped (kernels; path and K = 5 in PyTorch), and others that train."""
    return [
        table("frozen_mult", QuotientRemainder(num_collisions=7), "mult"),
        table("frozen_path", QuotientRemainder(num_collisions=7), "path", path_hidden=3),
        table("frozen_add", MixedRadix(sizes=(3, 3, 3, 3, 1)), "add"),
        table("mult", QuotientRemainder(num_collisions=7), "mult"),
        table("path", QuotientRemainder(num_collisions=7), "path", path_hidden=3),
    ]


def freeze(model: Any, requires_grad: bool = False) -> list[str]:
    names = [name for name, _ in model.named_parameters() if "frozen" in name]
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(requires_grad)
    return names


def frozen(model: Model) -> Model:
    freeze(model)
    return model


def part_frozen(model: Model) -> Model:
    model.collection.embedding_bags["a"].partition_0.requires_grad_(False)
    return model


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def trained(rank: int, world_size: int, sharding: str, optimizer: EmbOptimType, before: bool) -> dict[str, Any]:
    """Returns what moves while tables are frozen and once they are released, beside a job without frozen ones."""
    tables = configs()
    values = unsharded(tables)
    if before:
        freeze(values)
    # `shard` builds its own collection, so the flags are set on that.
    model = shard(tables, sharding, optimizer, values=values, wrap=frozen if before else lambda m: m)
    if not before:
        assert freeze(model)
    start, start_state = weights_of(model), state_of(model)
    train(model, tables, STEPS)
    kept, kept_state = weights_of(model), state_of(model)
    report = optimizer_of_each_parameter(model, [torch.optim.SGD([model.module.scale], 0.1)])
    freeze(model, requires_grad=True)
    train(model, tables, STEPS)
    released, released_state = weights_of(model), state_of(model)

    other = shard(tables, sharding, optimizer, values=unsharded(tables))
    train(other, tables, STEPS)
    expected, expected_state = weights_of(other), state_of(other)
    return {
        "moved": sorted(unequal(start, kept) | unequal(start_state, kept_state)),
        "moved when released": {n.split(".")[-3] for n in unequal(kept, released) if "frozen" in n}
        | {n.split()[1].split(".")[0] for n in unequal(kept_state, released_state) if "frozen" in n},
        "others differ": sorted(
            n
            for a, b in ((kept, expected), (kept_state, expected_state))
            for n in a
            if "frozen" not in n and not torch.allclose(a[n].double(), b[n].double(), rtol=1e-6, atol=1e-7)
        ),
        "reported": {name.split(".")[-3] for name in report if "partition" in name},
    }


@pytest.mark.parametrize(
    ("sharding", "optimizer", "before"),
    [
        ("table_wise", EmbOptimType.ADAM, True),
        ("table_wise", SGD, False),
        ("column_wise", ROWWISE, False),
        ("row_wise", EmbOptimType.ADAM, False),
        ("row_wise", ADAGRAD, True),
        ("data_parallel", EmbOptimType.ADAM, True),
        ("data_parallel", ADAGRAD, False),
    ],
)
def test_a_frozen_table_keeps_rows_and_state_until_it_is_released(
    sharding: str, optimizer: EmbOptimType, before: bool
) -> None:
    for result in run_ranks(trained, 2, sharding, optimizer, before):
        assert not [name for name in result["moved"] if "frozen" in name]
        assert result["others differ"] == []
        assert result["moved when released"] >= {"frozen_mult", "frozen_path", "frozen_add"}
        assert not [name for name in result["reported"] if "frozen" in name]
        assert result["reported"]  # the others


def at_rate_zero(rank: int, world_size: int, sharding: str) -> tuple[set[str], bool]:
    """Returns what moves at a rate of 0, and whether rows move once it is raised; by kernels and by PyTorch."""
    tables, moved, moved_later = configs()[:3], set[str](), False
    for kernels in (True, False):
        model = shard(tables, sharding, EmbOptimType.ADAM, values=unsharded(tables))
        for group in model.fused_optimizer.param_groups:
            group["lr"] = 0.0
        start = {**weights_of(model), **state_of(model)}
        with nullcontext() if kernels else without_kernels():
            train(model, tables, STEPS)
        moved |= unequal(start, {**weights_of(model), **state_of(model)}) - {"scale"}
        for group in model.fused_optimizer.param_groups:
            group["lr"] = 0.1
        train(model, tables, STEPS)
        moved_later = len(unequal(start, {**weights_of(model), **state_of(model)})) > 3
    return moved, moved_later


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_a_rate_of_zero_freezes(sharding: str) -> None:
    assert run_ranks(at_rate_zero, 2, sharding) == [(set(), True)] * 2


def refused(rank: int, world_size: int) -> str:
    tables = [plain_named("p"), table("a", QuotientRemainder(num_collisions=7), "mult")]
    plan = {"p": table_wise(rank=0, compute_kernel="fused"), "a": table_wise(rank=1)}
    with pytest.raises(NotImplementedError) as error:
        shard(tables, plan, wrap=lambda model: model.requires_grad_(False))
    model = shard(tables, plan)
    if rank == 0:
        # TorchRec shows a view of all tables that lie together, whose flag torch does not change.
        with pytest.raises(RuntimeError, match="requires_grad flags of leaf"):
            model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"table 'a': requires_grad of its partitions is \[False, True\]"):
        shard(tables, plan, wrap=part_frozen)
    return str(error.value)


def test_a_frozen_plain_table_is_refused_by_name_on_every_rank() -> None:
    for message in run_ranks(refused, 2):
        assert message.startswith("table 'p': requires_grad_(False) of a plain table is not honoured")
