"""Models that the planner's tests plan, on the meta device, and clusters to plan them for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from single_tables import bag_table, collection_of, plain_table
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner.types import ParameterConstraints

from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
from torchrec_qr.cli.schema import read_planner, read_tables
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.partitions import PartitionSpec
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

ROOT = Path(__file__).parents[2]
MLPERF = ROOT / "configs" / "mlperf_dcnv2_qr.yaml"
SHARDED = ["table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard"]


def qr(name: str, num_embeddings: int, num_collisions: int = 4, dim: int = 128, **fields: Any) -> Any:
    """A quotient-remainder table with one feature."""
    return table(name, QuotientRemainder(num_collisions=num_collisions), num_embeddings, dim, **fields)


def table(
    name: str, partitions: PartitionSpec, num_embeddings: int, dim: int = 128, **fields: Any
) -> CompositionalEmbeddingBagConfig:
    return bag_table(partitions, name=name, num_embeddings=num_embeddings, embedding_dim=dim, **fields)


def plain(name: str, num_embeddings: int, dim: int = 128, **fields: Any) -> Any:
    return plain_table(name=name, num_embeddings=num_embeddings, embedding_dim=dim, **fields)


def collection(tables: Sequence[EmbeddingBagConfig], is_weighted: bool = False) -> Any:
    return collection_of(tables, "meta", is_weighted)


def sharders(optimizer: EmbOptimType = EmbOptimType.EXACT_ADAGRAD) -> list[Any]:
    return [CompositionalEmbeddingBagCollectionSharder(fused_params={"optimizer": optimizer})]


def planner(
    world_size: int,
    local_world_size: int | None = None,
    device: str = "h100",
    memory_gib: float | None = None,
    batch_size: int = 8192,
    without_fixed_costs: bool = False,
    **arguments: Any,
) -> CompositionalEmbeddingShardingPlanner:
    hardware = hardware_named(device)
    if without_fixed_costs:
        hardware = replace(hardware, sharding_ms=0.0, replication_ms=0.0, concat_factor=0.0)
    topology = hardware.topology(world_size, local_world_size, memory_gib)
    return CompositionalEmbeddingShardingPlanner(topology, batch_size, hardware=hardware, **arguments)


def mlperf() -> tuple[list[Any], dict[str, ParameterConstraints]]:
    """Returns the tables of DLRM-DCNv2 under quotient-remainder, and how many ids a bag of each has."""
    return list(read_tables(MLPERF)), read_planner(MLPERF).parameter_constraints()


def only(
    constraints: dict[str, ParameterConstraints], tables: Sequence[EmbeddingBagConfig], sharding_types: list[str]
) -> dict[str, ParameterConstraints]:
    """The constraints, with these sharding types for all tables."""
    out = {}
    for t in tables:
        factors = constraints[t.name].pooling_factors if t.name in constraints else [1.0]
        out[t.name] = ParameterConstraints(pooling_factors=factors, sharding_types=sharding_types)
    return out
