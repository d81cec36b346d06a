"""Placements of a plan on the device that a rank really has."""

from dataclasses import replace

import torch
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardMetadata


def on_own_device(
    plan: dict[str, ParameterSharding], rank: int, device: torch.device | None
) -> dict[str, ParameterSharding]:
    """Returns a plan whose shards on ``rank`` lie on ``device``; all else is as in ``plan``, which stays as it is.

    Planners and TorchRec's helpers place rank r on ``cuda:(r % ranks of a node)``. A rank that sees one GPU alone, as
    under Slurm's ``--gpus-per-task=1``, has it as ``cuda:0``, and ``ShardedTensor`` refuses tensors on another device
    than the plan's.

    Args:
        plan: per table, as a sharder gets it.
        rank: this one, in the group of the plan.
        device: of this rank; None: the plan is returned.
    """
    if device is None or device.type == "meta":
        return plan
    return {name: _moved(sharding, rank, device) for name, sharding in plan.items()}


def _moved(sharding: ParameterSharding, rank: int, device: torch.device) -> ParameterSharding:
    spec = sharding.sharding_spec
    if not isinstance(spec, EnumerableShardingSpec):
        return sharding
    shards = []
    for shard in spec.shards:
        placement = shard.placement
        if isinstance(placement, _remote_device) and placement.rank() == rank and placement.device() != device:
            placement = _remote_device(f"rank:{rank}/{device}")
        shards.append(ShardMetadata(list(shard.shard_offsets), list(shard.shard_sizes), placement))
    return replace(sharding, sharding_spec=EnumerableShardingSpec(shards))
