"""The layout of a table under a plan: the rows and columns of its partitions on each rank.

The plan has one (R, D) placeholder per logical table. A shard of the placeholder has columns of the composed embedding,
and, if rows are split, a block of ids. The stored rows and columns of each partition follow from it.

If a plan splits the rows of the base partition, ranks send row codes in place of ids. TorchRec splits ids at multiples
of a block size. A row code makes these the boundaries of base rows, and its owner recovers the id:

    code = base_row(id) · C + rest(id)

For a closed form of stride M and size r, base_row = (id // M) % r, rest = id % M + M · (id // (M·r)) and
C = M · ⌈S / (M·r)⌉. For a class map rest = id and C = S. All numbers are int64.
"""

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
    """Returns the columns [a, b) of partition j that columns [start, stop) of the composed embedding depend on.

    There are none if a = b. They are the same columns under elementwise operations. Under ``concat`` partition j has
    D_j columns of its own.

    Args:
        config (CompositionalConfig): the table.
        j (int): the number of the partition.
        start (int): the first column of the embedding.
        stop (int): the end of the columns.

    Example:
        >>> from torchrec_qr import CompositionalEmbeddingBagConfig, QuotientRemainder
        >>> config = CompositionalEmbeddingBagConfig(
        ...     name="t", feature_names=["f"], num_embeddings=100, embedding_dim=16, operation="concat",
        ...     partitions=QuotientRemainder(num_collisions=4))
        >>> stored_columns(config, 0, 4, 16), stored_columns(config, 1, 4, 16)
        ((4, 8), (0, 8))
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
    """Returns the base rows of a block, ⌈rows / blocks⌉, whatever rows of the placeholder a plan has."""
    return -(-config.bound_partitions.sizes[config.base_partition] // num_blocks)


def num_row_blocks(logical: Sequence[ShardMetadata]) -> int:
    """Returns the number of row blocks: W under row-wise, else the local world size."""
    return len(logical) // len({shard.shard_offsets[1] for shard in logical})


@dataclass(frozen=True)
class RowCode:
    """The row codes of one table."""

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
        """Returns the codes (N,) int64 of ids (N,) in [0, S)."""
        p = self.config.bound_partitions
        ids = ids.to(torch.int64)
        row = p.class_rows(ids, class_map)[self.config.base_partition]
        if not isinstance(p, ClosedForm):
            return row * self.codes_per_row + ids
        stride, size = self._base(p)
        return row * self.codes_per_row + ids % stride + stride * (ids // (stride * size))

    def layout(self, first_row: int) -> CodeLayout:
        """Returns the inverse of codes minus ``first_row`` · C, which TorchRec's input dist subtracts."""
        p = self.config.bound_partitions
        stride, size = self._base(p) if isinstance(p, ClosedForm) else (0, 0)
        return CodeLayout(self.codes_per_row, stride, size, first_row)

    def _base(self, p: ClosedForm) -> tuple[int, int]:
        """Returns M and r, the stride and the size of the base partition."""
        base = self.config.base_partition
        return p.strides[base], p.sizes[base]


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """The layout of a compositional table under a plan.

    Args:
        config (CompositionalConfig): the table.
        sharding_type (str): the plan's sharding type.
        shards (Sequence[ShardMetadata]): the plan's shards on all ranks: for each block of columns its row blocks in
            order. There are none under data-parallel.
        compute_kernel (str): the plan's compute kernel.
        frozen (bool): whether the table required no gradient before it was sharded.
        is_copied (bool): whether each node has a copy of the table. The plan is then that of this rank's node.
    """

    config: CompositionalConfig
    sharding_type: str
    shards: Sequence[ShardMetadata]
    compute_kernel: str = EmbeddingComputeKernel.FUSED.value
    frozen: bool = False
    is_copied: bool = False

    @property
    def splits_rows(self) -> bool:
        """True if the plan splits rows, so that ranks send codes in place of ids."""
        return self.sharding_type in ROW_SPLIT

    @property
    def num_ids(self) -> int:
        """S, or the number of row codes of whole blocks if rows are split.

        TorchRec splits at multiples of ⌈num_ids / blocks⌉, which is then the number of codes of a block of base rows.
        """
        if not self.splits_rows:
            return self.config.num_embeddings
        return self._num_blocks * self._block_rows * RowCode(self.config).codes_per_row

    def is_replicated(self, j: int) -> bool:
        """Returns whether partition j is a replica: under data-parallel, or beside a base partition of split rows."""
        return self.sharding_type == DATA_PARALLEL or (self.splits_rows and j != self.config.base_partition)

    def stored_shards(self, j: int) -> list[ShardMetadata] | None:
        """Returns the shards of partition j on all ranks, or None if it is a replica."""
        if self.is_replicated(j):
            return None
        shards = (self.stored_shard(j, i) for i in range(len(self.shards)))
        return [shard for shard in shards if shard is not None]

    def stored_shard(self, j: int, i: int) -> ShardMetadata | None:
        """Returns the shard of partition j for the i-th of ``shards``; None if that one uses none of its columns."""
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
        """Returns the first base row of the i-th of ``shards`` if rows are split; past the last row if it has none."""
        return i % self._num_blocks * self._block_rows

    @cached_property
    def _num_blocks(self) -> int:
        return num_row_blocks(self.shards)

    @property
    def _block_rows(self) -> int:
        return block_rows(self.config, self._num_blocks)


class ShardLayouts(Mapping[str, ShardLayout]):
    """The layouts of the compositional tables of one collection, by name.

    Two objects are never equal, because TorchRec groups tables whose parameters are equal.
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
    """Returns a table's shards in a plan; none under data-parallel."""
    spec = sharding.sharding_spec
    return spec.shards if isinstance(spec, EnumerableShardingSpec) else []
