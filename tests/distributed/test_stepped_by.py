"""Which optimizer steps which parameter of a sharded model."""

import pytest
import torch
from parity_model import Run, TableCase, shard_run
from ranks import run_ranks
from sharded_model import LR, Model
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from torchrec_qr.distributed import optimizer_of_each_parameter

RUN = Run(
    (
        TableCase("tw", "strided", "table_wise", plan="hand"),
        TableCase("rw", "adjacent", "row_wise", plan="hand"),
        TableCase("dp", "strided", "data_parallel", plan="hand"),
        TableCase("plain_tw", "plain", "table_wise", plan="hand"),
        TableCase("plain_dp", "plain", "data_parallel", plan="hand"),
    ),
    optimizer="adagrad",
)
FUSED = [f"{t}.partition_{j}" for t in ("tw", "rw", "dp") for j in (0, 1)] + ["plain_tw"]


class WithTop(Model):
    def __init__(self, collection: nn.Module) -> None:
        super().__init__(collection)
        self.top = nn.Linear(80, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.top(super().forward(features))


def stepped(rank: int, world_size: int) -> tuple[dict[str, str], list[str]]:
    """What is reported when all is well, and the messages when it is not."""
    dmp = shard_run(RUN, model_type=WithTop)
    rest = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    adam = KeyedOptimizerWrapper(rest, lambda params: torch.optim.Adam(params))
    found = optimizer_of_each_parameter(dmp, [adam])
    warm = WarmupOptimizer(adam, [WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=1, value=0.1)])
    combined = CombinedOptimizer([("fused", dmp.fused_optimizer), ("dense", warm)])
    assert optimizer_of_each_parameter(dmp, [combined]) == found
    messages = []
    top = torch.optim.SGD(dmp.module.top.parameters(), lr=LR)
    everything = torch.optim.SGD(dmp.parameters(), lr=LR)
    for optimizers in ([top], [], [adam, top], [everything]):
        with pytest.raises(ValueError, match="allowed: exactly one") as error:
            optimizer_of_each_parameter(dmp, optimizers)
        messages.append(str(error.value))
    return found, messages


def test_each_parameter_of_a_sharded_model() -> None:
    prefix = "collection.embedding_bags."
    for found, (only_top, none, twice, everything) in run_ranks(stepped, 2):
        dense = {f"{prefix}plain_dp.weight": "Adam", "top.weight": "Adam", "top.bias": "Adam"}
        fused = {k: v for k, v in found.items() if k not in dense}
        assert found == dense | fused
        assert set(fused.values()) == {"fused Adagrad"}
        assert set(fused) <= {f"{prefix}{name}.weight" for name in FUSED}
        assert {f"{prefix}dp.partition_{j}.weight" for j in (0, 1)} <= set(fused)
        allowed = "; allowed: exactly one per parameter"
        assert only_top == f"no optimizer steps '{prefix}plain_dp.weight'{allowed}"
        assert all(repr(name) in none for name in dense)
        assert "'top.bias' is stepped by Adam and SGD" in twice
        assert "plain_dp" not in twice
        assert f"'{prefix}dp.partition_0.weight' is stepped by fused Adagrad and SGD" in everything


def test_attached_in_backward_outside_of_embeddings() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].requires_grad_(False)
    _apply_optimizer_in_backward(torch.optim.RMSprop, model["a"].parameters(), {"lr": LR})
    assert optimizer_of_each_parameter(model, []) == {"a.weight": "fused RMSprop"}
    _apply_optimizer_in_backward(torch.optim.SGD, model["a"].parameters(), {"lr": LR})
    with pytest.raises(ValueError, match=r"'a\.weight' is stepped by fused RMSprop and fused SGD"):
        optimizer_of_each_parameter(model, [])
