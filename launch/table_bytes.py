"""Bytes of the values of each table that a rank stores."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

from torchrec_qr import CompositionalEmbeddingBagConfig
from torchrec_qr.configs import stored_shapes
from torchrec_qr.distributed.layout import ShardLayout


def bytes_on_rank(task: nn.Module, shardings: Mapping[str, ParameterSharding], rank: int) -> dict[str, int]:
    """Returns the bytes of values of each table that a rank stores. A table without a sharding is on all ranks."""
    out: dict[str, int] = {}
    for table in _tables(task):
        sharding = shardings.get(table.name)
        spec = None if sharding is None else sharding.sharding_spec
        shards = spec.shards if isinstance(spec, EnumerableShardingSpec) else None
        sharding_type = "data_parallel" if sharding is None or shards is None else sharding.sharding_type
        out[table.name] = _bytes_of(table, sharding_type, shards or [], rank)
    return out


def _tables(module: nn.Module) -> list[EmbeddingBagConfig]:
    """Returns those of the outermost collections: feature generation has one within, of the partitions."""
    if isinstance(module, EmbeddingBagCollectionInterface):
        return module.embedding_bag_configs()
    return [table for child in module.children() for table in _tables(child)]


def _bytes_of(table: EmbeddingBagConfig, sharding_type: str, shards: list[Any], rank: int) -> int:
    total = 0
    for j, (rows, columns, dtype) in enumerate(stored_shapes(table)):
        of_partition = None if sharding_type == "data_parallel" else shards
        if isinstance(table, CompositionalEmbeddingBagConfig):
            of_partition = ShardLayout(table, sharding_type, shards).stored_shards(j)
        values = rows * columns if of_partition is None else _values(of_partition, rank)
        total += values * dtype.itemsize
    return total


def _values(shards: list[Any], rank: int) -> int:
    return sum(s.shard_sizes[0] * s.shard_sizes[1] for s in shards if s.placement.rank() == rank)
