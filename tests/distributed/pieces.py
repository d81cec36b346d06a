"""Tensors of which each rank holds pieces, as arrays that travel between processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Pieces = list[tuple[tuple[int, ...], tuple[int, ...], Any]]


def pieces_of(value: Any) -> Pieces:
    """(global size, offsets, values) of what this rank holds of a tensor."""
    if isinstance(value, DTensor):
        local: Any = value._local_tensor
        # An empty one has no shards, and yet the offsets of one.
        return [
            (tuple(value.size()), tuple(offsets), numpy_of(shard))
            for offsets, shard in zip(local.local_offsets(), local.local_shards(), strict=False)
        ]
    if not hasattr(value, "local_shards"):
        return [(tuple(value.shape), (0,) * value.dim(), numpy_of(value))]
    size = tuple(value.size())
    return [(size, tuple(s.metadata.shard_offsets), numpy_of(s.tensor)) for s in value.local_shards()]


def numpy_of(value: Tensor) -> Any:
    # NumPy has no bf16. Fingerprints are integers that a double does not hold.
    exact = value.detach().double() if value.is_floating_point() else value
    return exact.cpu().numpy().copy()


def assembled(per_rank: list[dict[str, Pieces]]) -> dict[str, Tensor]:
    """Full tensors from the pieces of all ranks; what several hold must be equal bit for bit, and all be there."""
    out: dict[str, Tensor] = {}
    for key in dict.fromkeys(k for rank in per_rank for k in rank):
        pieces = [piece for rank in per_rank for piece in rank.get(key, [])]
        full = torch.empty(pieces[0][0], dtype=torch.from_numpy(pieces[0][2]).dtype)
        stored = torch.zeros(full.shape, dtype=torch.bool)
        for size, offsets, values in pieces:
            assert size == tuple(full.shape), (key, size, full.shape)
            here = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            value = torch.from_numpy(values)
            assert bool((~stored[here] | (full[here] == value)).all()), f"{key} differs between ranks"
            full[here], stored[here] = value, True
        assert stored.all(), f"{key}: not all of it is stored"
        assert full.isfinite().all(), f"{key}: {full}"
        out[key] = full
    return out


def gathered(own: dict[str, Pieces]) -> dict[str, Tensor]:
    """Full tensors from the pieces of all ranks, which call this together."""
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, own)
    return assembled(per_rank)
