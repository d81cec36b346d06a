"""The layout of a table under a plan: which rows and columns of which partition lie where.

The plan has one (R, D) placeholder per logical table. A shard of it is a claim on *columns* of the composed
embedding, and, if rows are split, on a block of ids. This module derives from it what is stored of each partition.

If the rows of a table's base partition are split, the source rank sends row codes in place of ids. TorchRec cuts ids at
multiples of a block size. A code cuts at boundaries of base rows, and the owner recovers the id:

    code = base_row(id) · C + rest(id)

For a closed form, base_row = (id // M) % r; rest = id % M + M · (id // (M·r)) and C = M · ⌈S / (M·r)⌉. For explicit
maps rest = id and C = S. All in int64.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType

from torchrec_qr.configs import CompositionalConfig
from torchrec_qr.ops.description import CodeLayout
from torchrec_qr.partitions import ClosedForm

DATA_PARALLEL = ShardingType.DATA_PARALLEL.value
ROW_SPLIT = frozenset(t.value for t in (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD))


def stored_columns(config: CompositionalConfig, j: int, start: int, stop: int) -> tuple[int, int]:
    """Returns columns [a, b) of partition j, from which columns [start, stop) of the composed embedding follow.

    There are none if a = b. Elementwise operations are column-separable; under ``concat`` partition j covers D_j
    columns of its own.
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
    """Returns the base rows in a block, ⌈rows / blocks⌉, whatever the planner dealt of the placeholder's rows."""
    return math.ceil(config.bound_partitions.sizes[config.base_partition] / num_blocks)


def num_row_blocks(logical: Sequence[ShardMetadata]) -> int:
    """Returns the row blocks per block of columns: W under row-wise, else the local world size."""
    return len(logical) // len({shard.shard_offsets[1] for shard in logical})


@dataclass(frozen=True)
class RowCode:
    """The code of one table, and its inverse on the rank that owns base rows from ``first_row`` on."""

    config: CompositionalConfig

    def __post_init__(self) -> None:
        largest = self.config.bound_partitions.sizes[self.config.base_partition] * self.codes_per_row
        if largest >= 2**62:
            raise ValueError(
                f"table {self.config.name!r}: its ids need row codes up to {largest}; allowed: below 2^62 where rows "
                "are split; use another sharding type, or partitions of closed form"
            )

    @property
    def codes_per_row(self) -> int:
        """C."""
        p = self.config.bound_partitions
        if not isinstance(p, ClosedForm):
            return p.num_embeddings
        stride, size = self._base(p)
        return stride * -(-p.num_embeddings // (stride * size))

    def encode(self, ids: Tensor, class_map: Tensor | None) -> Tensor:
        """(N,) ids in [0, S) → (N,) int64 codes."""
        p = self.config.bound_partitions
        ids = ids.to(torch.int64)
        row = p.class_rows(ids, class_map)[self.config.base_partition]
        if not isinstance(p, ClosedForm):
            return row * self.codes_per_row + ids
        stride, size = self._base(p)
        return row * self.codes_per_row + ids % stride + stride * (ids // (stride * size))

    def layout(self, first_row: int) -> CodeLayout:
        """The inverse, of codes counted from ``first_row`` · C, as TorchRec's bucketizing leaves them."""
        p = self.config.bound_partitions
        stride, size = self._base(p) if isinstance(p, ClosedForm) else (0, 0)
        return CodeLayout(self.codes_per_row, stride, size, first_row)

    def _base(self, p: ClosedForm) -> tuple[int, int]:
        """M and r: stride and size of the base partition."""
        base = self.config.base_partition
        return p.strides[base], p.sizes[base]


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """The place of the rows and columns of a compositional table under a plan.

    Args:
        config: the table's.
        sharding_type: of the plan.
        shards: the plan's shards of the logical table, of all ranks: per block of columns, its row blocks in order
            (TorchRec's own order for grid). There are none under data-parallel.
        compute_kernel: of the plan.
        frozen: whether the table required no gradient before it was sharded.
    """

    config: CompositionalConfig
    sharding_type: str
    shards: Sequence[ShardMetadata]
    compute_kernel: str = EmbeddingComputeKernel.FUSED.value
    frozen: bool = False

    @property
    def splits_rows(self) -> bool:
        """True if ranks hold blocks of rows, so that codes travel in place of ids."""
        return self.sharding_type in ROW_SPLIT

    @property
    def num_ids(self) -> int:
        """S, or, if rows are split, the number of row codes rounded up to whole blocks.

        TorchRec cuts at multiples of ⌈num_ids / blocks⌉: here, of a block of base rows in codes.
        """
        if not self.splits_rows:
            return self.config.num_embeddings
        return self._num_blocks * self._block_rows * RowCode(self.config).codes_per_row

    def is_replicated(self, j: int) -> bool:
        """Returns whether all ranks hold all of partition j: under data-parallel, or beside a base split by rows."""
        return self.sharding_type == DATA_PARALLEL or (self.splits_rows and j != self.config.base_partition)

    def stored_shards(self, j: int) -> list[ShardMetadata] | None:
        """Returns the shards of partition j on all ranks, or None if it is replicated."""
        if self.is_replicated(j):
            return None
        shards = (self.stored_shard(j, i) for i in range(len(self.shards)))
        return [shard for shard in shards if shard is not None]

    def stored_shard(self, j: int, i: int) -> ShardMetadata | None:
        """Returns the shard of partition j for the i-th of ``shards``; None if that needs none of its columns."""
        logical = self.shards[i]
        start = logical.shard_offsets[1]
        a, b = stored_columns(self.config, j, start, start + logical.shard_sizes[1])
        if a == b:
            return None
        first, rows = 0, self.config.bound_partitions.sizes[j]
        if self.splits_rows:
            first = min(self.first_row(i), rows)
            rows = min(self._block_rows, rows - first)
        return ShardMetadata(shard_offsets=[first, a], shard_sizes=[rows, b - a], placement=logical.placement)

    def first_row(self, i: int) -> int:
        """Returns the first base row of the i-th of ``shards``, if rows are split; past the last one if it has none."""
        return i % self._num_blocks * self._block_rows

    @cached_property
    def _num_blocks(self) -> int:
        return num_row_blocks(self.shards)

    @property
    def _block_rows(self) -> int:
        return block_rows(self.config, self._num_blocks)


class ShardLayouts(Mapping[str, ShardLayout]):
    """The layouts of the compositional tables of one collection, by name.

    Two are equal if they are one object, because TorchRec compares and hashes what it groups tables by.
    """

    def __init__(self, layouts: Mapping[str, ShardLayout]) -> None:
        self._layouts = dict(layouts)

    def __getitem__(self, name: str) -> ShardLayout:
        return self._layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def shards_of(sharding: ParameterSharding) -> list[ShardMetadata]:
    """Returns the shards that a plan gives a table; none under data-parallel."""
    spec = sharding.sharding_spec
    return spec.shards if isinstance(spec, EnumerableShardingSpec) else []
