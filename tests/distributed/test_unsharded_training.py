"""An optimizer in backward on a collection that no sharder knows: each rank would hold and step all rows, or none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from global_batches import batch_of
from ranks import run_ranks
from sharded_model import Model, plain_named, sequences, two_tables
from single_tables import collection_of
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.shard import shard
from torchrec.distributed.sharding_plan import apply_to_all, construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardedModule
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_qr.distributed import get_default_sharders

CPU = torch.device("cpu")
PASS = r"allowed: sharders=torchrec_qr.distributed.get_default_sharders\(\)"
# DDP makes a stream for optimizers that are attached when it is called first. A torch for CUDA needs a GPU for that.
DDP_TAKES_OPTIMIZERS = torch.cuda.is_available() or not torch.backends.cuda.is_built()


def model_of(configs: list[Any], device: str, attached: bool = True) -> Model:
    model = Model(collection_of(configs, device))
    if attached:
        apply_optimizer_in_backward(torch.optim.Adagrad, model.parameters(), {"lr": 0.5})
    return model


def kinds() -> list[list[Any]]:
    return [two_tables(), [plain_named("plain")], [sequences()]]


def without_sharders(rank: int, world_size: int) -> None:
    """TorchRec's default sharders do not know the collection, and leave it to DDP."""
    for configs in kinds():
        with pytest.raises(RuntimeError, match=f"table '{configs[0].name}.*Adagrad, which was .* lost on cpu.*{PASS}"):
            DistributedModelParallel(model_of(configs, "meta"), device=CPU)
        batch = batch_of(configs, 0, rank, world_size)
        for early in [True, False] if DDP_TAKES_OPTIMIZERS else [False]:
            replicated = DistributedModelParallel(model_of(configs, "cpu", attached=early), device=CPU)
            with torch.no_grad():
                assert replicated(batch).numel()
            if not early:
                apply_optimizer_in_backward(torch.optim.Adagrad, replicated.parameters(), {"lr": 0.5})
            if world_size == 1:
                assert replicated(batch).numel()
            else:
                match = f"table '{configs[0].name}.*Adagrad is .*: each of 2 ranks.*{PASS}"
                with pytest.raises(RuntimeError, match=match):
                    replicated(batch)
        # A collection of each rank alone trains, such as one to compare a sharded one with.
        alone = model_of(configs, "cpu")
        before = [p.detach().clone() for p in alone.parameters()]
        alone(batch).sum().backward()
        assert not any(map(torch.equal, before, alone.parameters()))
        # Without an optimizer in backward, replicas are as TorchRec's.
        unattached = DistributedModelParallel(model_of(configs, "meta", attached=False), device=CPU)
        unattached(batch).sum().backward()
        assert all(p.grad is not None for p in unattached.parameters())
        sharded = DistributedModelParallel(model_of(configs, "meta"), device=CPU, sharders=get_default_sharders())
        assert any(isinstance(module, ShardedModule) for module in sharded.modules())
        sharded(batch).sum().backward()


@pytest.mark.parametrize("world_size", [1, 2])
def test_distributed_model_parallel_without_sharders(world_size: int) -> None:
    run_ranks(without_sharders, world_size)


def test_a_lost_optimizer_is_refused_at_the_first_call() -> None:
    configs = two_tables()
    batch = batch_of(configs, 0, 0, 1)
    values = collection_of(configs).state_dict()
    leave: list[Callable[[nn.Module], Any]] = [
        lambda collection: collection.to_empty(device="cpu"),
        lambda collection: collection.load_state_dict(values, assign=True),
    ]
    for move in leave:
        collection = model_of(configs, "meta").collection
        move(collection)
        with torch.no_grad():
            collection(batch)
        with pytest.raises(RuntimeError, match=r"table 'a.partition_0': Adagrad, which was .* lost"):
            collection(batch)
        apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.5})
        assert collection(batch).values().requires_grad


def helpers(rank: int, world_size: int) -> None:
    for configs in kinds():
        collection = collection_of(configs, "meta")
        match = f"Could not find a valid sharder type for <class '.*{type(collection).__name__}'>"
        (sharder,) = (s for s in get_default_sharders() if s.module_type is type(collection))
        per_table = apply_to_all(collection, table_wise(rank=0), sharder)
        assert set(per_table) == {config.name for config in configs}
        plan = construct_module_sharding_plan(collection, per_table, sharder)
        calls: list[Callable[[], Any]] = [
            lambda: apply_to_all(collection, table_wise(rank=0)),  # noqa: B023
            lambda: construct_module_sharding_plan(collection, per_table),  # noqa: B023
            lambda: shard(collection, plan),  # noqa: B023
        ]
        for call in calls:
            with pytest.raises(AssertionError, match=match):
                call()
        # TorchRec marks a collection that it has tried to shard.
        other = collection_of(configs, "meta")
        assert isinstance(shard(other, plan, device=CPU, sharder=sharder), ShardedModule)


def test_helpers_without_a_sharder_name_the_class() -> None:
    run_ranks(helpers, 1)
