"""Category ids: what a collection accepts, and what happens to an id outside [0, S).

This is the first step of the data flow and the only one that looks at the values of ids. It runs where the batch is
read (under sharding: on the source rank, before any bucketing), so every later step may rely on 0 <= id < S.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.late_errors import check_later, raise_pending

OutOfRange = Literal["error", "clamp", "wrap", "unchecked"]
OUT_OF_RANGE_POLICIES: tuple[str, ...] = get_args(OutOfRange)


class IdSpace(NamedTuple):
    """The ids that ``feature`` may carry into ``table``: [0, num_ids), and the policy for all others."""

    table: str
    feature: str
    num_ids: int
    out_of_range: str


class Bags(NamedTuple):
    """One feature's ids (N,), offsets (B + 1,) and lengths (B,) of its bags, and its per-id weights (N,) or None."""

    ids: Tensor
    offsets: Tensor
    lengths: Tensor
    weights: Tensor | None


def bags_of(features: KeyedJaggedTensor, spaces: list[IdSpace], weighted: bool) -> list[Bags]:
    """Reads one `Bags` per id space from a batch, its ids brought into [0, S) by the space's policy.

    Policies: ``"error"`` raises; ``"clamp"`` takes min(max(id, 0), S - 1); ``"wrap"`` takes id mod S (never
    negative); ``"unchecked"`` passes ids through and leaves their range to the caller. On a CPU ``"error"`` looks at
    the batch at once. On CUDA it must not stall the step: ids are clamped, the extremes travel to the host
    asynchronously, and the IndexError is raised by a later batch, or by `torchrec_qr.raise_pending`.

    Raises:
        KeyError: the batch lacks a feature.
        TypeError: ids are not integers.
        IndexError: an id outside [0, S) under ``"error"``; names table, feature, id and S.
        ValueError: ``weighted`` and the batch has no weights, or not one weight per id.
    """
    raise_pending(wait=False)
    if weighted:
        _check_weights(features)
    jagged = _jagged_by_feature(features)
    bags = []
    for space in spaces:
        if space.feature not in jagged:
            raise KeyError(
                f"table {space.table!r}: feature {space.feature!r} is not in the batch; its keys are {features.keys()}"
            )
        f = jagged[space.feature]
        ids = bounded_ids(f.values(), space)
        bags.append(Bags(ids, f.offsets(), f.lengths(), f.weights() if weighted else None))
    return bags


def _jagged_by_feature(features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
    if features.lengths().numel():
        return features.to_dict()
    # A batch of no samples, of which TorchRec's `to_dict` raises IndexError.
    empty = JaggedTensor(features.values(), weights=features.weights_or_none(), lengths=features.lengths())
    return dict.fromkeys(features.keys(), empty)


def bounded_ids(ids: Tensor, space: IdSpace) -> Tensor:
    """Returns ``ids`` (N,) as int64, brought into [0, S) by the policy of ``space`` (see `bags_of`)."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"table {space.table!r}, feature {space.feature!r}: ids have dtype {ids.dtype}; allowed: int32, int64"
        )
    # int64 before any arithmetic: an S above 2^31 would overflow int32.
    ids = ids.to(torch.int64)
    match space.out_of_range:
        case "clamp":
            return ids.clamp(0, space.num_ids - 1)
        case "wrap":
            return ids.remainder(space.num_ids)
        case "error" if ids.numel() and ids.is_cuda:
            return _clamped_with_deferred_error(ids, space)
        case "error" if ids.numel() and not ids.is_meta:
            low, high = torch.stack(ids.aminmax()).tolist()
            raise_if_outside(low, high, space)
    return ids


def _clamped_with_deferred_error(ids: Tensor, space: IdSpace) -> Tensor:
    def check(extremes: Tensor) -> None:
        low, high = extremes.tolist()
        raise_if_outside(low, high, space)

    check_later(torch.stack(ids.aminmax()), check)
    return ids.clamp(0, space.num_ids - 1)


def raise_if_outside(low: int, high: int, space: IdSpace) -> None:
    """Raises IndexError unless the least and the largest id of a batch lie in [0, S)."""
    if low < 0 or high >= space.num_ids:
        raise IndexError(
            f"table {space.table!r}, feature {space.feature!r}: id {low if low < 0 else high} is outside "
            f"[0, {space.num_ids}); out_of_range may be 'error' (as here), 'clamp', 'wrap' or 'unchecked'"
        )


def _check_weights(features: KeyedJaggedTensor) -> None:
    weights, ids = features.weights_or_none(), features.values()
    if weights is None:
        raise ValueError(f"a weighted collection got a batch without weights; its keys are {features.keys()}")
    if weights.numel() == ids.numel():
        return
    raise ValueError(
        f"features {features.keys()}: {weights.numel()} weights for {ids.numel()} ids; allowed: one weight per id"
    )
