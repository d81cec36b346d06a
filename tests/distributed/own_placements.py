"""Plans whose shards lie on the devices that ranks have, whatever their number."""

from typing import TypeVar

import torch
from ranks import own_device
from torch.distributed import _remote_device
from torchrec.distributed.types import EmbeddingModuleShardingPlan, EnumerableShardingSpec

Plan = TypeVar("Plan", bound=EmbeddingModuleShardingPlan)


def on_devices_of_ranks(plan: Plan) -> Plan:
    """Changes a plan, for which rank R of a node has GPU R, to ranks that share the GPUs in turn; see `run_ranks`."""
    kind = own_device().type
    for sharding in plan.values():
        if isinstance(sharding.sharding_spec, EnumerableShardingSpec):
            for shard in sharding.sharding_spec.shards:
                placement = shard.placement
                rank = (_remote_device(placement) if isinstance(placement, str) else placement).rank()
                device = f"cuda:{rank % torch.cuda.device_count()}" if kind == "cuda" else kind
                shard.placement = _remote_device(f"rank:{rank}/{device}")
    return plan
