"""Tensors of which each rank stores shards, as a ``state_dict`` has them: ``ShardedTensor`` or ``DTensor``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.types import ShardingEnv, ShardingEnv2D


class LocalPiece(NamedTuple):
    """The values of a shard on this rank, and their place in the whole tensor."""

    offsets: tuple[int, ...]
    values: Tensor


class ShardGroup(NamedTuple):
    """The ranks that have the shards of a table.

    Args:
        pg (dist.ProcessGroup | None): the ranks: under 2D parallelism those of the sharding group.
        mesh (DeviceMesh | None): the mesh of a ``DTensor``. A tensor is a ``ShardedTensor`` without one.
    """

    pg: dist.ProcessGroup | None
    mesh: DeviceMesh | None = None

    @classmethod
    def of_env(cls, env: ShardingEnv) -> "ShardGroup":
        """Returns the ranks of an environment."""
        pg = env.sharding_pg if isinstance(env, ShardingEnv2D) else env.process_group
        return cls(pg, env.device_mesh if env.output_dtensor else None)

    @classmethod
    def of_table(cls, table: ShardedEmbeddingTable, pg: dist.ProcessGroup | None) -> "ShardGroup":
        """Returns the ranks of TorchRec's description of a shard, whose group is ``pg``."""
        return cls(pg, None if table.dtensor_metadata is None else table.dtensor_metadata.mesh)

    def tensor(
        self,
        pieces: Sequence[Tensor],
        local: Sequence[ShardMetadata],
        shards: Sequence[ShardMetadata],
        size: Sequence[int],
        dtype: torch.dtype,
        placement: Placement,
    ) -> ShardedTensor | DTensor:
        """Returns the whole tensor, in the storage of ``pieces``.

        Args:
            pieces (Sequence[Tensor]): the values of the shards on this rank.
            local (Sequence[ShardMetadata]): their places.
            shards (Sequence[ShardMetadata]): the places of all shards.
            size (Sequence[int]): the size of the whole tensor.
            dtype (torch.dtype): its type.
            placement (Placement): how a ``DTensor`` describes the split. TorchRec's checkpoints read the places.
        """
        if self.mesh is not None:
            return _dtensor(pieces, local, size, self.mesh, placement)
        # Pass the metadata, because the usual constructor gathers it, and ranks without a shard do not call it.
        metadata = ShardedTensorMetadata(
            shards_metadata=list(shards), size=torch.Size(size), tensor_properties=TensorProperties(dtype=dtype)
        )
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            local_shards=[Shard(piece, shard) for piece, shard in zip(pieces, local, strict=True)],
            sharded_tensor_metadata=metadata,
            process_group=self.pg,
        )


def local_pieces(value: Tensor | ShardedTensor | DTensor) -> list[LocalPiece]:
    """Returns the parts of a state dict's tensor that are on this rank: all of a plain one."""
    if isinstance(value, ShardedTensor):
        return [LocalPiece(tuple(s.metadata.shard_offsets), s.tensor) for s in value.local_shards()]
    if isinstance(value, DTensor):
        with torch.no_grad():
            local = value.to_local()
        if not isinstance(local, LocalShardsWrapper):
            raise TypeError(f"a DTensor of {type(local).__name__}; allowed: one of TorchRec's LocalShardsWrapper")
        places = zip(local.local_offsets(), local.local_shards(), strict=False)
        return [LocalPiece(tuple(offsets), shard) for offsets, shard in places]
    return [LocalPiece((0,) * value.dim(), value)]


def _dtensor(
    pieces: Sequence[Tensor],
    local: Sequence[ShardMetadata],
    size: Sequence[int],
    mesh: DeviceMesh,
    placement: Placement,
) -> DTensor:
    # Leave out empty shards, because DCP knows a shard by its offsets, which are those of the next shard.
    stored = [(piece, shard) for piece, shard in zip(pieces, local, strict=True) if piece.numel()]
    wrapper = LocalShardsWrapper([piece for piece, _ in stored], [tuple(shard.shard_offsets) for _, shard in stored])
    out: DTensor = DTensor.from_local(
        wrapper,
        mesh,
        (*[Replicate()] * (mesh.ndim - 1), placement),
        run_check=False,
        shape=torch.Size(size),
        stride=(size[1], 1) if len(size) == 2 else (1,),
    )
    return out
