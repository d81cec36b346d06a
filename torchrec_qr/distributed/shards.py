"""Which rows and columns of which partition lie where, given the plan's shards of the logical table.

The plan knows one (R, D) placeholder per logical table. A shard of it is a claim on *columns* of the composed
embedding, and, where rows are split, on a block of ids; what is stored for it follows here, partition by partition.
"""

import math
from collections.abc import Sequence

from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.types import ShardingType

from torchrec_qr.configs import CompositionalConfig

DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
ROW_SPLIT = frozenset(t.value for t in (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD))


def is_replicated(config: CompositionalConfig, j: int, sharding_type: str) -> bool:
    """Whether all ranks hold all of partition j: under data-parallel, or beside a base partition split by rows."""
    return sharding_type == DATA_PARALLEL or (sharding_type in ROW_SPLIT and j != config.base_partition)


def stored_columns(config: CompositionalConfig, j: int, start: int, stop: int) -> tuple[int, int]:
    """Columns [a, b) of partition j from which columns [start, stop) of the composed embedding follow; a = b: none.

    Elementwise operations are column-separable; under ``concat`` partition j covers D_j columns of its own.
    """
    if config.operation == "path":
        assert (start, stop) == (0, config.embedding_dim), "refused by the sharder"
        return 0, config.partition_columns[j]
    if config.operation != "concat":
        return start, stop
    first = sum(config.partition_columns[:j])
    a, b = max(start - first, 0), min(stop - first, config.partition_columns[j])
    return (a, b) if a < b else (0, 0)


def block_rows(config: CompositionalConfig, num_blocks: int) -> int:
    """Rows of the base partition in a block, ⌈rows / blocks⌉, whatever the planner dealt of the placeholder's rows."""
    return math.ceil(config.bound_partitions.sizes[config.base_partition] / num_blocks)


def num_row_blocks(logical: Sequence[ShardMetadata]) -> int:
    """Row blocks per block of columns: W under row-wise, the local world size under table-row-wise and grid."""
    return len(logical) // len({shard.shard_offsets[1] for shard in logical})


def stored_shard(
    config: CompositionalConfig, j: int, sharding_type: str, logical: Sequence[ShardMetadata], i: int
) -> ShardMetadata | None:
    """The shard of partition j for the i-th logical shard; None where that needs none of its columns.

    ``logical`` lists, per block of columns, its row blocks in order (TorchRec's own order for grid).
    """
    start = logical[i].shard_offsets[1]
    a, b = stored_columns(config, j, start, start + logical[i].shard_sizes[1])
    if a == b:
        return None
    first, rows = 0, config.bound_partitions.sizes[j]
    if sharding_type in ROW_SPLIT:
        blocks = num_row_blocks(logical)
        block = block_rows(config, blocks)
        first = min(i % blocks * block, rows)
        rows = min(block, rows - first)
    return ShardMetadata(shard_offsets=[first, a], shard_sizes=[rows, b - a], placement=logical[i].placement)


def stored_shards(
    config: CompositionalConfig, j: int, sharding_type: str, logical: Sequence[ShardMetadata]
) -> list[ShardMetadata] | None:
    """All shards of partition j, or None where it is replicated."""
    if is_replicated(config, j, sharding_type):
        return None
    shards = (stored_shard(config, j, sharding_type, logical, i) for i in range(len(logical)))
    return [shard for shard in shards if shard is not None]
