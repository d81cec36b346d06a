"""The ids that a collection accepts, and the policies for an id outside [0, S).

This is the first step of a forward, on the rank that has the batch, before the input dist. Later steps require
0 <= id < S, except that kernels on a GPU check ids themselves.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_qr.late_errors import check_later, raise_pending

OutOfRange = Literal["error", "clamp", "wrap", "unchecked"]
OUT_OF_RANGE_POLICIES: tuple[str, ...] = get_args(OutOfRange)


class IdSpace(NamedTuple):
    """The ids [0, num_ids) that a feature may have for a table, and the policy for all others."""

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
    """Returns one `Bags` per id space of a batch, with its ids in [0, S) by the policy of the space.

    ``"error"`` raises, ``"clamp"`` returns min(max(id, 0), S - 1), ``"wrap"`` returns id mod S (never negative), and
    ``"unchecked"`` returns the id itself. On a CPU ``"error"`` checks the batch at once. On CUDA the host must not
    wait: ids are clamped, their extremes are copied to the host, and a later batch raises, at the latest
    `torchrec_qr.raise_pending`.

    Args:
        features (KeyedJaggedTensor): the batch.
        spaces (list[IdSpace]): the features to read.
        weighted (bool): whether to read the weights of ids.

    Raises:
        KeyError: the batch lacks a feature.
        TypeError: ids are not integers.
        IndexError: an id is outside [0, S) under ``"error"``. The message has the table, the feature, the id and S.
        ValueError: the batch has no weights, or not one per id, though ``weighted``.
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
    # Handle a batch without samples, because TorchRec's `to_dict` raises IndexError.
    empty = JaggedTensor(features.values(), weights=features.weights_or_none(), lengths=features.lengths())
    return dict.fromkeys(features.keys(), empty)


def bounded_ids(ids: Tensor, space: IdSpace) -> Tensor:
    """Returns ``ids`` (N,) as int64, brought into [0, S) by the policy of ``space`` (see `bags_of`)."""
    check_type(ids, space)
    # Cast before any arithmetic, because an S above 2^31 overflows int32.
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


def check_type(ids: Tensor, space: IdSpace) -> None:
    """Raises TypeError unless ids are integers."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"table {space.table!r}, feature {space.feature!r}: ids have dtype {ids.dtype}; allowed: int32, int64"
        )


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
