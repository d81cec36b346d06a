"""Tensors of which each rank holds pieces, as arrays that travel between processes."""

from typing import Any

import torch
from torch import Tensor

Pieces = list[tuple[tuple[int, ...], tuple[int, ...], Any]]


def pieces_of(value: Any) -> Pieces:
    """(global size, offsets, values) of what this rank holds of a tensor."""
    if not hasattr(value, "local_shards"):
        return [(tuple(value.shape), (0,) * value.dim(), numpy_of(value))]
    size = tuple(value.size())
    return [(size, tuple(s.metadata.shard_offsets), numpy_of(s.tensor)) for s in value.local_shards()]


def numpy_of(value: Tensor) -> Any:
    return value.detach().double().cpu().numpy().copy()


def assembled(per_rank: list[dict[str, Pieces]]) -> dict[str, Tensor]:
    """Full tensors from the pieces of all ranks; what several hold must be equal bit for bit, and all be there."""
    out: dict[str, Tensor] = {}
    for key in dict.fromkeys(k for rank in per_rank for k in rank):
        pieces = [piece for rank in per_rank for piece in rank.get(key, [])]
        full = torch.full(pieces[0][0], torch.nan, dtype=torch.float64)
        for size, offsets, values in pieces:
            assert size == tuple(full.shape), (key, size, full.shape)
            part = full[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))]
            value = torch.from_numpy(values)
            assert bool((part.isnan() | (part == value)).all()), f"{key} differs between ranks"
            part.copy_(value)
        assert not full.isnan().any(), f"{key}: not all of it is stored"
        out[key] = full
    return out
