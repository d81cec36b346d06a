"""Plans that place a rank on a device of another name than the one it sees, as where each rank sees one GPU alone."""

from typing import Any

import torch
import torch.distributed as dist
from global_batches import batch_of
from placements import placements
from ranks import run_ranks
from sharded_model import shard, two_tables, unsharded, weights_of
from torch import nn
from torchrec.distributed.sharding_plan import ParameterShardingGenerator, row_wise
from torchrec.distributed.types import ParameterSharding

from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.distributed.sharder import on_own_device


def elsewhere(generate: ParameterShardingGenerator) -> ParameterShardingGenerator:
    """The placements of a node of GPUs: rank r on cuda:r."""

    def generated(param: nn.Parameter, *args: Any) -> ParameterSharding:
        sharding = generate(param, *args)
        for one in sharding.sharding_spec.shards:  # type: ignore[union-attr]
            rank = one.placement.rank()
            one.placement = torch.distributed._remote_device(f"rank:{rank}/cuda:{rank}")
        return sharding

    return generated


def trained(rank: int, world_size: int, sharding: str, moved: bool) -> dict[str, list[float]]:
    configs = two_tables()
    generators = placements(configs, sharding)
    if moved:
        generators = {name: elsewhere(generate) for name, generate in generators.items()}
    model = shard(configs, generators, values=unsharded(configs))
    out = model(batch_of(configs, 0, rank, world_size))
    out.square().sum().backward()
    dist.barrier()
    return {name: value.flatten().tolist() for name, value in weights_of(model).items()}


def test_a_rank_takes_its_shards_to_the_device_it_has() -> None:
    for sharding in ("table_wise", "column_wise", "row_wise"):
        assert run_ranks(trained, 2, sharding, True) == run_ranks(trained, 2, sharding, False)


def test_only_the_own_shards_move_and_the_given_plan_stays() -> None:
    generate = elsewhere(row_wise())
    plan = {"a": generate(nn.Parameter(torch.empty(60, 24)), 2, 2, "cpu", CompositionalEmbeddingBagCollectionSharder())}
    given = [str(s.placement) for s in plan["a"].sharding_spec.shards]  # type: ignore[union-attr]
    own = on_own_device(plan, 1, torch.device("cuda", 0))["a"].sharding_spec
    assert given == ["rank:0/cuda:0", "rank:1/cuda:1"]
    assert [str(s.placement) for s in own.shards] == ["rank:0/cuda:0", "rank:1/cuda:0"]  # type: ignore[union-attr]
    assert [str(s.placement) for s in plan["a"].sharding_spec.shards] == given  # type: ignore[union-attr]
    assert on_own_device(plan, 1, None) is plan
