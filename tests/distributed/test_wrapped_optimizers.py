"""Rates and optimizers of each table, and TorchRec's wrappers around the optimizer of each parameter."""

from typing import Any

import torch
from parity_model import Run, TableCase, one_of_each, shard_run
from pieces import Pieces, assembled
from ranks import run_ranks
from sharded_model import Model, loss_of, own_state, own_weights
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import LAMB, in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from torchrec_qr.distributed import optimizer_of_each_parameter

RUN = Run((*one_of_each(plan="hand"), TableCase("lamb", "strided", "row_wise", plan="hand")))
RATES = {case.name: 0.01 * (i + 1) for i, case in enumerate(RUN.tables)}


def attached() -> nn.Module:
    """The run's collection with an optimizer for each table: SGD at rates of their own, and LAMB."""
    collection: Any = RUN.collection("meta")
    for name, table in collection.embedding_bags.items():
        optimizer = LAMB if name == "lamb" else torch.optim.SGD
        _apply_optimizer_in_backward(optimizer, table.parameters(), {"lr": RATES[name]})
    return collection


def sharded() -> Any:
    return shard_run(RUN, RUN.sharders({}), attached())


def backward(dmp: nn.Module, world_size: int) -> None:
    loss_of(dmp(RUN.own_batch(0)), world_size).backward()


def stepped(rank: int, world_size: int) -> tuple[dict[str, Pieces], dict[str, Pieces], dict[str, float]]:
    dmp = sharded()
    backward(dmp, world_size)
    groups = dict(zip(dmp.fused_optimizer.params, dmp.fused_optimizer.param_groups, strict=True))
    return own_weights(dmp), own_state(dmp), {name: group["lr"] for name, group in groups.items()}


def expected_by_sgd(rate_of: dict[str, float]) -> dict[str, torch.Tensor]:
    module = RUN.initial()
    model = Model(module)
    loss_of(model(RUN.batch(0).kjt(weighted=False)), 1).backward()
    return {
        f"collection.{name}": (p - rate_of[name.split(".")[1]] * p.grad).detach().double()
        for name, p in module.named_parameters()
        if ".lamb." not in name
    }


def test_each_table_steps_at_its_own_rate_by_its_own_optimizer() -> None:
    ranks = run_ranks(stepped, 2)
    weights, state = (assembled([rank[i] for rank in ranks]) for i in (0, 1))
    for key, value in expected_by_sgd(RATES).items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert {key.split()[1] for key in state} == {
        f"lamb.partition_{j}.{name}" for j in (0, 1) for name in ("momentum1", "exp_avg_sq", "step")
    }
    for rank in ranks:
        assert {name: rate for name, rate in rank[2].items() if rate != RATES[name.split(".")[2]]} == {}


def wrapped(rank: int, world_size: int) -> dict[str, Pieces]:
    """Warm-up around clipping around each parameter's optimizer, in one combination with a dense one."""
    dmp = sharded()
    own: list[tuple[str, Any]] = []
    for name, p in in_backward_optimizer_filter(dmp.named_parameters(), include=True):
        (inner,) = p._in_backward_optimizers  # type: ignore[attr-defined]
        clipped = GradientClippingOptimizer(inner, GradientClipping.NORM, max_gradient=1e-9)
        stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=10, value=0.5)]
        p._in_backward_optimizers = [
            WarmupOptimizer(clipped, stages, lr=RATES[name.split(".")[2]], param_name="warmup")
        ]
        own.append((name, p._in_backward_optimizers[0]))
    layer = nn.Linear(2, 1)
    dense = KeyedOptimizerWrapper(dict(layer.named_parameters()), lambda params: torch.optim.Adam(params))
    combined = CombinedOptimizer([*own, ("dense", dense)])
    combined.zero_grad()
    backward(dmp, world_size)
    combined.step()
    combined.load_state_dict(combined.state_dict())
    assert all(o.state_dict()["state"]["warmup"]["warmup"].tolist() == [1, 0] for _, o in own)
    assert set(optimizer_of_each_parameter(dmp, [combined]).values()) == {"fused Sgd", "fused Lamb"}
    return own_weights(dmp)


def test_wrappers_around_each_parameters_optimizer() -> None:
    """A warm-up begins at half the rate. Clipping has no gradient to clip, because the backward has stepped rows."""
    weights = assembled(run_ranks(wrapped, 2))
    for key, value in expected_by_sgd({name: rate / 2 for name, rate in RATES.items()}).items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6, msg=key)
