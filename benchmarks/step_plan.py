"""Plans where the tables of a variant lie, by TorchRec's planner or by this project's."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingPlan

from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, Hardware
from torchrec_qr.planner.hardware import HARDWARE


def plan(
    model: nn.Module,
    sharder: Any,
    constraints: Mapping[str, ParameterConstraints],
    bags: int,
    device: torch.device,
    ours: bool,
) -> ShardingPlan:
    """Plans a model for all ranks, which must call this together, with ``bags`` a rank."""
    hardware = hardware_here(device)
    world_size = dist.get_world_size()
    arguments: dict[str, Any] = {
        "topology": hardware.topology(world_size, get_local_size(world_size), memory_gib(device)),
        "batch_size": bags,
        "constraints": dict(constraints),
        "storage_reservation": FixedPercentageStorageReservation(0.15),
    }
    if ours:
        planner: Any = CompositionalEmbeddingShardingPlanner(hardware=hardware, **arguments)
    else:
        planner = EmbeddingShardingPlanner(**arguments)
    found: ShardingPlan = planner.collective_plan(model, [sharder], dist.GroupMember.WORLD)
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def hardware_here(device: torch.device) -> Hardware:
    """Returns the planner's constants of this device, those of an A100 for a card that they lack."""
    name = device_name(device).upper()
    return next((h for key, h in HARDWARE.items() if key.upper() in name), HARDWARE["a100"])


def memory_gib(device: torch.device) -> float:
    """Returns the memory of a rank: its GPU's, or its share of the host's; of all ranks, the least."""
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device).total_memory
    else:
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // get_local_size(dist.get_world_size())
    least = torch.tensor([own / 2**30], dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return float(least)
