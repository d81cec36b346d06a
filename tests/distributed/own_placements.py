"""Plans whose shards lie on the devices that ranks have, whatever their number."""

from typing import TypeVar

from ranks import device_of
from torch.distributed import _remote_device
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec

Plan = TypeVar("Plan", bound=EmbeddingModuleShardingPlan)


def on_devices_of_ranks(plan: Plan) -> Plan:
    """Changes a plan, for which rank R of a node has GPU R, to where `run_ranks` has them compute."""
    for sharding in plan.values():
        if isinstance(sharding.sharding_spec, EnumerableShardingSpec):
            for shard in sharding.sharding_spec.shards:
                placement = shard.placement
                rank = (_remote_device(placement) if isinstance(placement, str) else placement).rank()
                shard.placement = _remote_device(f"rank:{rank}/{device_of(rank)}")
    return plan
