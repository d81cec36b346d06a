"""TorchRec's ``WarmupOptimizer`` around each parameter's in-backward optimizer: rows step at the rate of the stage."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from global_batches import batch_of
from placements import plan_of
from ranks import own_device, run_ranks
from sharded_model import ADAGRAD, LR, SGD, Model, plain_named, shard, sharders_of, table, train, two_tables, weights_of
from single_tables import collection_of
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from torchrec_qr import QuotientRemainder
from torchrec_qr.distributed import optimizer_of_each_parameter

STEPS = 4
# At step i of 10 the rate is 0.5 (0.2 + 0.8 i / 10).
RATES = [0.5 * (0.2 + 0.8 * i / 10) for i in range(STEPS)]


def warmed_up(model: nn.Module) -> list[WarmupOptimizer]:
    """Puts a warm-up around the in-backward optimizer of each parameter."""
    wrapped = []
    for _, p in tables_of(model):
        stages = [WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=10, value=0.2)]
        p._in_backward_optimizers = [
            WarmupOptimizer(p._in_backward_optimizers[0], stages, lr=0.5, param_name="__warmup_state")
        ]
        wrapped += p._in_backward_optimizers
    return wrapped


def tables_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if hasattr(p, "_in_backward_optimizers")]


def moves(model: DistributedModelParallel, configs: list[Any], optimizers: list[WarmupOptimizer]) -> list[Any]:
    """How far weights move in each step. Their gradients are the same in all steps, because the loss is linear."""
    found = []
    for _ in range(STEPS):
        before = {name: value.clone() for name, value in weights_of(model).items()}
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(batch_of(configs, 0, dist.get_rank(), dist.get_world_size())).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append({name: value - before[name] for name, value in weights_of(model).items()})
    return found


def sharded(collection: Any, sharder: Any, generators: dict[str, Any]) -> DistributedModelParallel:
    plan = ShardingPlan({"collection": plan_of(collection, generators, sharder)})
    return DistributedModelParallel(Model(collection), device=own_device(), plan=plan, sharders=[sharder])


def compositional(rank: int, world_size: int) -> list[float]:
    # Partitions whose gradient no other row changes: those of "add".
    configs = [table(name, QuotientRemainder(num_collisions=7), "add") for name in ("a", "b")]
    sharder = sharders_of({"optimizer": SGD, "learning_rate": LR})[0]
    generators = {"a": table_wise(rank=0, compute_kernel="fused"), "b": row_wise(compute_kernel="fused")}
    model = sharded(collection_of(configs, "meta"), sharder, generators)
    optimizers = warmed_up(model)
    steps = moves(model, configs, optimizers)
    for rate, step in zip(RATES, steps, strict=True):
        for name, moved in step.items():
            torch.testing.assert_close(moved / rate, steps[0][name] / RATES[0], rtol=2e-3, atol=1e-5)
    assert all(steps[0][f"collection.embedding_bags.{t}.partition_{j}.weight"].any() for t in "ab" for j in (0, 1))
    for optimizer in optimizers:
        assert optimizer.state_dict()["state"]["__warmup_state"]["warmup"].tolist() == [STEPS, 0]
    # The partitions of a table are stepped by the fused optimizer alone.
    rules = optimizer_of_each_parameter(model, [])
    assert set(rules.values()) == {"fused Sgd"}
    # A rank without rows of a table has an optimizer of no parameters.
    return [o.param_groups[0]["lr"] for o in optimizers if o.param_groups]


def test_rows_of_partitions_step_at_the_rate_of_the_stage() -> None:
    rate = 0.5 * (0.2 + 0.8 * STEPS / 10)
    first, second = run_ranks(compositional, 2)
    assert first == pytest.approx([rate] * 4)
    assert second == pytest.approx([rate] * 2)


def plain(rank: int, world_size: int) -> list[list[dict[str, Tensor]]]:
    config = plain_named("p")
    fused = {"optimizer": SGD, "learning_rate": LR}
    generators = {"p": table_wise(rank=0, compute_kernel="fused")}
    found = []
    for collection, sharder in (
        (EmbeddingBagCollection(tables=[config], device=torch.device("meta")), EmbeddingBagCollectionSharder(fused)),
        (collection_of([config], "meta"), sharders_of(fused)[0]),
    ):
        torch.manual_seed(0)
        model = sharded(collection, sharder, generators)
        found.append(moves(model, [config], warmed_up(model)))
    return found


def test_plain_tables_step_as_torchrecs() -> None:
    ((theirs, ours),) = run_ranks(plain, 1)
    for expected, actual in zip(theirs, ours, strict=True):
        for name, moved in actual.items():
            assert moved.any()
            assert torch.equal(moved, expected[name])


def states(rank: int, world_size: int) -> None:
    """The optimizer of a parameter has the state of its partition, in the memory of the fused optimizer."""
    configs = two_tables()[:1]
    model = shard(configs, "table_wise", ADAGRAD)
    train(model, configs, range(1))
    whole = model.fused_optimizer.state_dict()["state"]
    own = {name: p._in_backward_optimizers[0].state_dict()["state"][""] for name, p in tables_of(model)}
    assert len(own) == 2
    for name, of_partition in own.items():
        ((key, value),) = of_partition.items()
        (piece,), (expected,) = (v.local_shards() for v in (value, whole[name][key]))
        assert key == f"{'.'.join(name.split('.')[2:-1])}.momentum1"
        assert piece.tensor.any()
        assert piece.tensor.data_ptr() == expected.tensor.data_ptr()


def test_the_optimizer_of_a_parameter_has_the_state_of_its_partition() -> None:
    run_ranks(states, 1)
