"""Steps are the same under all seven sharding types, replicated partitions included, where the reference says which."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from assert_all_close import assert_all_close
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from parity_model import Run, TableCase, Trained, one_of_each, shard_run, train, trained
from parity_reference import Reference, assert_trained_as_reference
from pieces import Pieces, assembled
from placements import SHARDINGS
from ranks import run_ranks
from sharded_model import LR, Model, loss_of, own_weights
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_row_wise, table_wise
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

TABLES = (
    *one_of_each(),
    *(TableCase(f"add_{s}", "mixed_radix", s, k=3, operation="add", pooling="mean") for s in SHARDINGS),
    TableCase("path", "strided", "row_wise", operation="path"),
)


@pytest.mark.parametrize("limit", [0.125, 0.0])
def test_clipped_gradients(limit: float) -> None:
    """Entries of a row's gradient, of the loss over the global batch, are clipped to ±max_gradient."""
    run = Run(TABLES)
    params = {
        "optimizer": EmbOptimType.EXACT_SGD,
        "learning_rate": LR,
        "gradient_clipping": True,
        "max_gradient": limit,
    }
    ranks = run_ranks(train, 4, run, params, local_world_size=2)
    assert_trained_as_reference(run, ranks, max_gradient=limit)


def warmed_up(rank: int, world_size: int, run: Run) -> Trained:
    dmp = shard_run(run)
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=4, value=0.25)]
    optimizer = WarmupOptimizer(dmp.fused_optimizer, stages, lr=LR)
    return trained(rank, world_size, run, dmp, after=optimizer.step)


def halved(rank: int, world_size: int, run: Run) -> Trained:
    dmp = shard_run(run)
    schedule = torch.optim.lr_scheduler.ExponentialLR(dmp.fused_optimizer, gamma=0.5)
    return trained(rank, world_size, run, dmp, after=schedule.step)


def test_schedules() -> None:
    """TorchRec's warm-up and torch's schedulers, of plain tables too."""
    run = Run((*TABLES, TableCase("plain", "plain", "table_wise")), optimizer="rowwise_adagrad")
    assert_trained_as_reference(run, run_ranks(halved, 4, run, local_world_size=2), learning_rates=[LR, LR / 2, LR / 4])
    # A linear warm-up from 1/4 over 4 steps: 1/4 + step · 3/16.
    rates = [LR * (0.25 + 0.75 * step / 4) for step in range(3)]
    assert_trained_as_reference(run, run_ranks(warmed_up, 4, run, local_world_size=2), learning_rates=rates)


def test_a_learning_rate_alone_makes_sgd_everywhere() -> None:
    """``fused_params`` without ``optimizer`` mean FBGEMM's default, SGD: under data-parallel as elsewhere."""
    run = Run(TABLES)
    ranks = run_ranks(train, 2, run, {"learning_rate": LR})
    assert_trained_as_reference(run, ranks)


def test_eps_zero_leaves_untouched_rows_alone() -> None:
    """0 / (√0 + 0) of a row that no rank looked up must not become NaN, nor move the row."""
    run = Run(TABLES, optimizer="adagrad", steps=1)
    params = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": LR, "eps": 0.0}
    weights = assembled([r.state for r in run_ranks(train, 2, run, params)])
    reference = Reference(run)
    reference.step(run.batch(0))
    initial = run.initial().state_dict()
    stayed = 0
    for key, _, expected in reference.weights():
        untouched = (expected == initial[key.removeprefix("collection.")].double()).all(dim=1)
        assert torch.equal(weights[key][untouched], expected[untouched]), key
        assert weights[key].isfinite().all(), key
        stayed += int(untouched.sum())
    assert stayed > 20


def accumulated(rank: int, world_size: int, run: Run) -> dict[str, Pieces]:
    """Weights after one step of a dense optimizer on the gradients of three backwards; all kernels dense."""
    dmp = shard_run(run, run.sharders({}), kernel="dense")
    for step in range(run.steps):
        loss_of(dmp(run.own_batch(step)), world_size).backward()
    torch.optim.SGD(dmp.parameters(), lr=LR).step()
    return own_weights(dmp)


def test_dense_gradients_accumulate() -> None:
    """Gradients of an earlier backward, already the same on all ranks, are not multiplied by the next reduction."""
    # TorchRec's own dense kernel on a plain table beside ours.
    run = Run(tuple(replace(t, plan="hand") for t in (*TABLES, TableCase("plain", "plain", "table_wise"))))
    for world_size in (2, 4):
        weights = assembled(run_ranks(accumulated, world_size, run, local_world_size=2))
        module = run.initial()
        model = Model(module)
        for step in range(run.steps):
            loss_of(model(run.batch(step).kjt(run.weighted)), 1).backward()
        expected = {f"collection.{n}": (p - LR * p.grad).detach().double() for n, p in module.named_parameters()}
        assert_all_close(weights, expected, f"{world_size} ranks", 1e-5, 1e-5)


def kernels_of(rank: int, world_size: int) -> list[str]:
    run = Run(one_of_each(("table_wise", "row_wise", "table_row_wise")))
    module = run.collection("meta")
    _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": LR})
    make: dict[str, Any] = {
        "table_wise": table_wise(rank=0),
        "row_wise": row_wise(),
        "table_row_wise": table_row_wise(host_index=0),
    }
    plan = construct_module_sharding_plan(module, make, run.sharders({})[0], device_type="cpu")
    return [sharding.compute_kernel for sharding in plan.values()]


def test_plans_by_hand_are_fused_where_an_optimizer_is_attached() -> None:
    """TorchRec's helpers choose the fused kernel for parameters that are marked so; ours are."""
    assert run_ranks(kernels_of, 1) == [["fused"] * 3]
