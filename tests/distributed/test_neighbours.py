"""What stands beside the collections in TorchRec works, or is refused by name: see `docs/compatibility.md`."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sharded_model import NUM_IDS, table
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv

from torchrec_qr import CompositionalEmbeddingBagCollection, QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder


def with_dtensor(rank: int, world_size: int) -> None:
    collection = CompositionalEmbeddingBagCollection(
        tables=[table("a", QuotientRemainder(NUM_IDS, 7), "mult")], device=torch.device("meta")
    )
    sharder = CompositionalEmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(collection, {"a": table_wise(rank=0)}, sharder, 1, 1, "cpu")
    assert dist.group.WORLD is not None
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    env.output_dtensor = True
    with pytest.raises(NotImplementedError, match=r"tables \['a'\]: output_dtensor=True .*DMPCollection"):
        sharder.shard(collection, dict(plan), env, torch.device("cpu"))


def test_dtensor_output_is_refused() -> None:
    """Also what refuses `DMPCollection`, whose environment always asks for it."""
    run_ranks(with_dtensor, 1)
