"""What TorchRec's description of a shard lacks of a compositional table, attached to it."""

from dataclasses import dataclass

from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardedEmbeddingTable

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.distributed.fused_params import says_something
from torchrec_qr.distributed.shards import stored_shard


@dataclass(frozen=True)
class Placed:
    """What TorchRec's own description of a shard has no field for: a compositional table, its sharding type, and
    whether it was frozen before it was sharded."""

    config: CompositionalConfig
    sharding_type: str
    frozen: bool


def placed(table: ShardedEmbeddingTable) -> Placed | None:
    """What `place` attached; None for a plain table."""
    return getattr(table, "compositional", None)


def place(table: ShardedEmbeddingTable, config: CompositionalConfig, sharding_type: str, frozen: bool) -> None:
    """Attaches a `Placed`. TorchRec copies configs field by field, so it cannot travel in one of them."""
    table.compositional = Placed(config, sharding_type, frozen)  # type: ignore[attr-defined]


def is_fused(table: ShardedEmbeddingTable) -> bool:
    """Whether rows are stepped in backward: by the fused kernel, or because anything is said of the table's optimizer.

    TorchRec's dense kernel, which is the one it has for data-parallel, would drop an attached optimizer in silence.
    """
    attached = any(says_something(key, value) for key, value in (table.fused_params or {}).items())
    return table.compute_kernel == EmbeddingComputeKernel.FUSED or attached


def compositional(table: ShardedEmbeddingTable) -> Placed:
    """What `place` attached to a table that is known to be compositional."""
    at = placed(table)
    assert at is not None
    return at


def logical_shards(table: ShardedEmbeddingTable) -> list[ShardMetadata]:
    """The plan's shards of the logical table, of all ranks."""
    assert table.global_metadata is not None
    return table.global_metadata.shards_metadata


def stored_shard_of(table: ShardedEmbeddingTable, j: int) -> ShardMetadata | None:
    """What is stored of partition j for this rank's logical shard; None where that needs none of its columns."""
    at = compositional(table)
    return stored_shard(at.config, j, at.sharding_type, logical_shards(table), position_of(table))


def position_of(table: ShardedEmbeddingTable) -> int:
    """The place of this rank's logical shard among all of the table's."""
    assert table.local_metadata is not None
    return logical_shards(table).index(table.local_metadata)
