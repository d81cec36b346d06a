"""Dense layers in FSDP beside sharded tables, and unsharded models in DDP and FSDP, train as one process does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from global_batches import batch_of
from ranks import run_ranks
from sharded_model import DIM, LR, SGD, Model, loss_of, plain_named, shard, two_tables, unsharded
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_qr.distributed import optimizer_of_each_parameter

STEPS = range(3)


def configs() -> list[Any]:
    return [*two_tables(), plain_named("plain")]


class Scorer(nn.Module):
    """A layer behind the tables, with the same values wherever it is built."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.layer = model, nn.Linear(DIM * len(configs()), 3)
        generator = torch.Generator().manual_seed(5)
        for p in self.layer.parameters():
            p.data.normal_(0, 0.2, generator=generator)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        out: Tensor = self.layer(self.model(features))
        return out


def in_one_process(rank: int, world_size: int) -> list[Tensor]:
    """Returns the outputs of this rank's bags at each step, of the batch of all ranks."""
    model = Scorer(unsharded(configs()))
    optimizer, outs = torch.optim.SGD(model.parameters(), LR), []
    for step in STEPS:
        outs.append(model(batch_of(configs(), step, rank, world_size)).detach())
        loss_of(model(batch_of(configs(), step, 0, 1)), 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outs


def assert_trains(rank: int, world_size: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step, expected in zip(STEPS, in_one_process(rank, world_size), strict=True):
        out = model(batch_of(configs(), step, rank, world_size))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, msg=lambda m, s=step: f"step {s}: {m}")
        loss_of(out, world_size).backward()
        optimizer.step()
        optimizer.zero_grad()


def beside_sharded_tables(rank: int, world_size: int, sharding: str) -> None:
    model = shard(configs(), sharding, SGD, unsharded(configs()), wrap=Scorer, init_data_parallel=False)
    of_tables = {p for name, p in model.named_parameters() if ".collection." in name}
    fully_shard(model, ignored_params=of_tables)
    layers = {name: p for name, p in model.named_parameters() if p not in of_tables}
    assert len(layers) == 3
    assert all(isinstance(p, DTensor) for p in layers.values())
    assert not any(isinstance(p, DTensor) for p in of_tables)
    # The plain table of this plan has the dense kernel.
    optimizer = torch.optim.SGD(dict(in_backward_optimizer_filter(model.named_parameters())).values(), LR)
    stepped = optimizer_of_each_parameter(model, [optimizer])
    assert {stepped[name] for name in layers} == {"SGD"}
    assert {by for name, by in stepped.items() if ".partition_" in name} == {"fused Sgd"}
    assert_trains(rank, world_size, model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_fsdp_shards_dense_layers_beside_sharded_tables(sharding: str) -> None:
    run_ranks(beside_sharded_tables, 2, sharding)


def alone(rank: int, world_size: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Scorer(unsharded(configs())))
    assert_trains(rank, world_size, model, torch.optim.SGD(model.parameters(), LR))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_unsharded_models_train_in_ddp_and_fsdp(wrap: Callable[[nn.Module], nn.Module]) -> None:
    run_ranks(alone, 2, wrap)
