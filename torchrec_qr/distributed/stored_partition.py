"""One partition in the memory of a rank, split or replicated."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torchrec.distributed.types import ShardingType

from torchrec_qr.distributed.global_tensor import ShardGroup, local_pieces
from torchrec_qr.distributed.layout import ShardLayout
from torchrec_qr.ops.out_of_memory import named_zeros

# How a ``DTensor`` of TorchRec's describes the split of a table: by columns under the other sharding types.
_PLACEMENTS: dict[str, Placement] = {
    ShardingType.TABLE_WISE.value: Replicate(),
    ShardingType.ROW_WISE.value: Shard(0),
}


class StoredPartition:
    """One partition on this rank: a replica, or the rank's shards of the partition in one storage.

    Args:
        layout (ShardLayout): the layout of the table.
        j (int): the number of the partition.
        fused (bool): whether the backward steps rows.
        device (torch.device | None): the device of the storage.
        positions (Sequence[int]): the numbers of the plan's shards on this rank. There may be none.

    Attributes:
        key (tuple[str, int]): the table's name and j.
        name (str): ``<table>.partition_<j>``.
        weight (nn.Parameter): the model's parameter: (rows, columns) of all shards here, one below the other, or flat
            if their widths differ.
        leaves (list[nn.Parameter]): if ``fused``, a leaf of the graph for each shard here, in the storage of
            ``weight``. A view of ``weight`` would have a dense gradient instead.
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
        rows, columns, self._dtype = config.partition_shapes[j]
        self._size = rows, columns
        self._shards = layout.stored_shards(j)
        self._placement = _PLACEMENTS.get(layout.sharding_type, Shard(1))
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
        """Returns whether the rank stores rows for the plan's shard ``position``."""
        return position in self._local

    def piece(self, position: int) -> Tensor:
        """Returns the rows (rows, columns) for the plan's shard ``position``, as a tensor of the graph."""
        i = list(self._local).index(position)
        # Make a view for each forward, because optimizers and checkpoints change parameters in place.
        return self.leaves[i] if self.leaves else self._pieces(self.weight)[i]

    @property
    def reduced(self) -> nn.Parameter:
        """The parameter of a replica, whose gradient ranks reduce."""
        return self.leaves[0] if self.leaves else self.weight

    @property
    def is_replicated(self) -> bool:
        """True if every rank stores the whole partition."""
        return self._shards is None

    def as_global(self, group: ShardGroup, pieces: Sequence[Tensor] | None = None) -> Tensor | ShardedTensor | DTensor:
        """Returns the tensor of a ``state_dict``: a plain one of a replica, and a sharded one of a split partition.

        Args:
            group (ShardGroup): the ranks of the shards.
            pieces (Sequence[Tensor] | None): tensors of the shapes of the shards here. Default: the partition's values.
        """
        if pieces is None:
            pieces = self._pieces(self.weight.detach())
        if self._shards is None:
            return pieces[0]
        dtype = pieces[0].dtype if pieces else self._dtype
        return group.tensor(pieces, list(self._local.values()), self._shards, self._size, dtype, self._placement)

    def rows_as_global(self, group: ShardGroup, pieces: Sequence[Tensor]) -> Tensor | ShardedTensor | DTensor:
        """Returns the tensor of a ``state_dict`` for one scalar per row and column shard.

        It has the column shards end to end, as TorchRec's does.
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
        return group.tensor(pieces, mine, rows_of, (ends[-1],), torch.float32, Shard(0))

    def part_of(self, value: Tensor | ShardedTensor | DTensor) -> Tensor:
        """Returns this rank's rows of a partition, in the shape of ``weight``.

        Args:
            value (Tensor | ShardedTensor | DTensor): the whole partition, or the same shards of it.
        """
        if self._shards is None:
            assert isinstance(value, Tensor)
            return value
        if isinstance(value, ShardedTensor | DTensor):
            pieces = [piece.values for piece in local_pieces(value)]
        else:
            pieces = [_cut(value, shard) for shard in self._local.values()]
        if not pieces:
            # Return the shape of no rows here too, because a ``DTensor`` has no empty shards.
            return self.weight.new_empty(0 if self.weight.numel() else self.weight.shape)
        return torch.cat([piece.reshape(-1) for piece in pieces]).view(self.weight.shape)

    def _pieces(self, storage: Tensor) -> list[Tensor]:
        flat = storage.view(-1)
        return [
            flat[first:last].view(size) for size, (first, last) in zip(self._sizes, pairwise(self._starts), strict=True)
        ]


def _cut(value: Tensor, shard: ShardMetadata) -> Tensor:
    (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
    return value[row : row + rows, column : column + columns]
