"""One partition in the memory of a rank, wherever its rows lie."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata

from torchrec_qr.configs import DTYPES
from torchrec_qr.distributed.layout import ShardLayout
from torchrec_qr.ops.out_of_memory import named_zeros


class StoredPartition:
    """One partition as this rank stores it: all of it, or those of its shards that lie here, in one storage.

    Args:
        layout: of the partition's table.
        j: its number.
        fused: whether rows are stepped in backward.
        device: of the storage.
        positions: of those of the plan's shards that lie here, if the partition is split; there may be none.

    Attributes:
        weight: the parameter that the model shows. Its shape is (rows, columns) of all shards here, one below the
            other, or flat where they differ in width.
        leaves: if ``fused``, a tensor of the graph for each shard here, over the storage of ``weight``. It is a leaf
            of its own, because the gradient of a view of ``weight`` would be dense.
    """

    def __init__(
        self,
        layout: ShardLayout,
        j: int,
        fused: bool,
        device: torch.device | None,
        positions: Sequence[int] = (),
    ) -> None:
        config = layout.config
        self.key = config.name, j
        self.name = f"{config.name}.partition_{j}"
        self._size = config.bound_partitions.sizes[j], config.partition_columns[j]
        self._dtype = DTYPES[config.partition_data_types[j]]
        self._shards = layout.stored_shards(j)
        self._local: dict[int, ShardMetadata] = {}
        if self._shards is not None:
            here = ((i, layout.stored_shard(j, i)) for i in positions)
            self._local = {i: shard for i, shard in here if shard is not None}
        shards = self._local.values()
        self._sizes = [self._size] if self._shards is None else [torch.Size(shard.shard_sizes) for shard in shards]
        self._starts = list(accumulate((a * b for a, b in self._sizes), initial=0))
        shape = self._sizes[0] if len(self._sizes) == 1 else (self._starts[-1],)
        storage = named_zeros(f"table {config.name!r}, partition {j}", shape, self._dtype, device)
        widths = {columns for _, columns in self._sizes}
        shown = storage.view(-1, *widths) if len(widths) == 1 else storage
        self.weight = nn.Parameter(shown, requires_grad=not layout.frozen)
        self.leaves = [nn.Parameter(piece) for piece in self._pieces(storage)] if fused else []

    def holds(self, position: int) -> bool:
        """Returns whether a part of the partition is stored for the plan's shard at ``position``."""
        return position in self._local

    def piece(self, position: int) -> Tensor:
        """Returns what is stored for the plan's shard at ``position``, (rows, columns), as a tensor of the graph."""
        i = list(self._local).index(position)
        # Make a view anew in every forward, because optimizers and checkpoints change parameters in place.
        return self.leaves[i] if self.leaves else self._pieces(self.weight)[i]

    @property
    def reduced(self) -> nn.Parameter:
        """The parameter of a replicated partition whose gradient the ranks reduce."""
        return self.leaves[0] if self.leaves else self.weight

    @property
    def is_replicated(self) -> bool:
        """True if every rank holds all of the partition."""
        return self._shards is None

    def as_global(self, pg: dist.ProcessGroup | None, pieces: Sequence[Tensor] | None = None) -> Tensor | ShardedTensor:
        """Returns what a ``state_dict`` shows: a plain tensor of a replicated partition, otherwise a sharded one.

        Args:
            pg: of the ranks that hold the shards.
            pieces: tensors shaped as the shards here; default: the values of the partition.
        """
        if pieces is None:
            pieces = self._pieces(self.weight.detach())
        if self._shards is None:
            return pieces[0]
        dtype = pieces[0].dtype if pieces else self._dtype
        return _sharded(pieces, list(self._local.values()), self._shards, self._size, dtype, pg)

    def rows_as_global(self, pg: dist.ProcessGroup | None, pieces: Sequence[Tensor]) -> Tensor | ShardedTensor:
        """Returns what `as_global` does for one scalar a row and column shard: the column shards end to end.

        That is TorchRec's layout.
        """
        if self._shards is None:
            return pieces[0]
        by_column = sorted(self._shards, key=lambda s: (s.shard_offsets[1], s.shard_offsets[0]))
        ends = list(accumulate((s.shard_sizes[0] for s in by_column), initial=0))
        rows_of = [
            ShardMetadata(shard_offsets=[first], shard_sizes=[last - first], placement=shard.placement)
            for shard, (first, last) in zip(by_column, pairwise(ends), strict=True)
        ]
        mine = [rows_of[by_column.index(shard)] for shard in self._local.values()]
        return _sharded(pieces, mine, rows_of, (ends[-1],), torch.float32, pg)

    def part_of(self, value: Tensor | ShardedTensor) -> Tensor:
        """Returns the part of a partition that is stored here, shaped as ``weight``.

        Args:
            value: the whole partition, or the same shards of it.
        """
        if self._shards is None:
            assert isinstance(value, Tensor)
            return value
        if isinstance(value, ShardedTensor):
            pieces = [shard.tensor for shard in value.local_shards()]
        else:
            pieces = [_cut(value, shard) for shard in self._local.values()]
        if not pieces:
            return self.weight.new_empty(0)
        return torch.cat([piece.reshape(-1) for piece in pieces]).view(self.weight.shape)

    def _pieces(self, storage: Tensor) -> list[Tensor]:
        flat = storage.view(-1)
        return [
            flat[first:last].view(size) for size, (first, last) in zip(self._sizes, pairwise(self._starts), strict=True)
        ]


def _cut(value: Tensor, shard: ShardMetadata) -> Tensor:
    (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
    return value[row : row + rows, column : column + columns]


def _sharded(
    pieces: Sequence[Tensor],
    local: Sequence[ShardMetadata],
    shards: list[ShardMetadata],
    size: tuple[int, ...],
    dtype: torch.dtype,
    pg: dist.ProcessGroup | None,
) -> ShardedTensor:
    # Built from known metadata: the usual constructor gathers it, and ranks without a shard here do not take part.
    metadata = ShardedTensorMetadata(
        shards_metadata=shards, size=torch.Size(size), tensor_properties=TensorProperties(dtype=dtype)
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local_shards=[Shard(piece, shard) for piece, shard in zip(pieces, local, strict=True)],
        sharded_tensor_metadata=metadata,
        process_group=pg,
    )
