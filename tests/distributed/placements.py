"""Plans by hand: where tables lie under each sharding type."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from ranks import device_of, own_device
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    column_wise,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardMetadata,
)

from torchrec_qr import CompositionalEmbeddingBagConfig
from torchrec_qr.distributed import per_node

SHARDINGS = (
    "table_wise",
    "column_wise",
    "table_column_wise",
    "row_wise",
    "table_row_wise",
    "grid_shard",
    "data_parallel",
)
# All that sequences can have, and all that differ on one host.
BASIC_SHARDINGS = ("table_wise", "column_wise", "row_wise", "data_parallel")
# One copy of a table per node, for compositional tables.
PER_NODE = ("table_wise_per_node", "column_wise_per_node", "row_wise_per_node")
COLUMN_SPLIT = ("column_wise", "table_column_wise", "grid_shard")

# The variable that has the ranks of a sharding group, for which plans are made under 2D parallelism.
SHARDING_GROUP = "TORCHREC_QR_SHARDING_GROUP"


def ranks_of_plan() -> int:
    """All ranks, or those of a sharding group."""
    return int(os.environ.get(SHARDING_GROUP, dist.get_world_size()))


def placement(sharding: str, i: int, dim: int, width: int = 8) -> ParameterShardingGenerator:
    """How table number i lies under a sharding type: first ranks and hosts differ, column shards are ``width`` wide."""
    world_size, local_size = ranks_of_plan(), int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = world_size // local_size
    match sharding:
        case "table_wise":
            return table_wise(rank=i % world_size)
        case "column_wise":
            # Several shards on one rank, not in the order of the columns.
            return column_wise(ranks=[(i + c) % world_size for c in (1, 0, 1, 1)][: dim // width])
        case "table_column_wise":
            return table_column_wise(ranks=[i % hosts * local_size + c % local_size for c in range(2)])
        case "row_wise":
            return row_wise()
        case "table_row_wise":
            return table_row_wise(host_index=i % hosts)
        case "grid_shard":
            return grid_of(hosts=[(i + 1 + n) % hosts for n in range(hosts)])
        case "table_wise_per_node":
            return per_node(table_wise(rank=i % local_size))
        case "column_wise_per_node":
            return per_node(column_wise(ranks=[(i + c) % local_size for c in (1, 0, 1, 1)][: dim // width]))
        case "row_wise_per_node":
            return per_node(row_wise())
    return data_parallel()


def placements(
    configs: Iterable[EmbeddingBagConfig], sharding: str | Mapping[str, str]
) -> dict[str, ParameterShardingGenerator]:
    """All tables under one sharding type or each under its own, or under the nearest that the table can have."""
    types = {c.name: sharding if isinstance(sharding, str) else sharding[c.name] for c in configs}
    return {c.name: placement(_possible(types[c.name], c), i, c.embedding_dim) for i, c in enumerate(configs)}


def _possible(sharding: str, config: EmbeddingBagConfig) -> str:
    if isinstance(config, CompositionalEmbeddingBagConfig):
        if config.operation == "path" and sharding.removesuffix("_per_node") in COLUMN_SPLIT:
            return "row_wise_per_node" if sharding.endswith("_per_node") else "row_wise"
        return sharding
    # Do as the planner on a CPU, because it has no row-wise plain tables.
    nearest = {"row_wise": "table_wise", "table_row_wise": "column_wise", "grid_shard": "column_wise"}
    sharding = sharding.removesuffix("_per_node")
    return nearest.get(sharding, sharding)


def table_column_wise(ranks: list[int]) -> ParameterShardingGenerator:
    """Makes the plan that the planner of TorchRec makes, because its helper for plans by hand is column-wise."""

    def generate(*args: Any, **kwargs: Any) -> ParameterSharding:
        return replace(column_wise(ranks=ranks)(*args, **kwargs), sharding_type="table_column_wise")

    return generate


def grid_of(hosts: list[int]) -> ParameterShardingGenerator:
    """Grid shards, columns cut by host and rows by rank of it: TorchRec's own cuts no less than 128 columns."""

    def generate(param: nn.Parameter, local_size: int, *_: object) -> ParameterSharding:
        rows, columns = -(-param.shape[0] // local_size), param.shape[1] // len(hosts)
        shards = [
            ShardMetadata(
                shard_offsets=[row, block * columns],
                shard_sizes=[min(rows, param.shape[0] - row), columns],
                placement=f"rank:{host * local_size + i}/{device_of(host * local_size + i)}",
            )
            for block, host in enumerate(hosts)
            for i, row in enumerate(range(0, param.shape[0], rows))
        ]
        ranks = [s.placement.rank() for s in shards]
        return ParameterSharding("grid_shard", "fused", ranks, EnumerableShardingSpec(shards))

    return generate


def plan_of(
    collection: nn.Module, generators: Mapping[str, ParameterShardingGenerator], sharder: Any
) -> EmbeddingModuleShardingPlan:
    """The entries of the tables that are given, in a plan for the ranks that there are."""
    parameters, plan = sharder.shardable_parameters(collection), EmbeddingModuleShardingPlan()
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    for name, generate in generators.items():
        plan[name] = generate(parameters[name], local_size, ranks_of_plan(), own_device().type, sharder)
    return plan
