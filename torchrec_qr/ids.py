"""The ids that a collection accepts, and the policies for an id outside [0, S).

This is the first step of a forward, on the rank that has the batch, before the input dist. Later steps require
0 <= id < S, except that kernels on a GPU check ids themselves.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.late_errors import check_later, raise_pending
from torchrec_qr.variable_batches import with_one_number_of_bags

OutOfRange = Literal["error", "clamp", "wrap", "unchecked"]
OUT_OF_RANGE_POLICIES: tuple[str, ...] = get_args(OutOfRange)


class IdSpace(NamedTuple):
    """The ids [0, num_ids) that a feature may have for a table, and the policy for all others."""

    table: str
    feature: str
    num_ids: int
    out_of_range: str


def arranged(features: KeyedJaggedTensor, spaces: list[IdSpace], weighted: bool, pooled: bool) -> KeyedJaggedTensor:
    """Returns the feature of each id space, in order. If these are the batch as it is, nothing is copied.

    Args:
        features (KeyedJaggedTensor): the batch.
        spaces (list[IdSpace]): the features to read.
        weighted (bool): whether to read the weights of ids.
        pooled (bool): whether all features must have one number of bags. Empty bags then follow those of the others.

    Raises:
        KeyError: the batch lacks a feature.
        ValueError: the batch has no weights, or not one per id, though ``weighted``. Or pooled features differ in
            their numbers of bags, and the batch has no inverse indices.
    """
    raise_pending(wait=False)
    if weighted:
        _check_weights(features)
    keys = features.keys()
    number = {key: i for i, key in enumerate(keys)}
    for space in spaces:
        if space.feature not in number:
            raise KeyError(f"table {space.table!r}: feature {space.feature!r} is not in the batch; its keys are {keys}")
    if pooled:
        features = with_one_number_of_bags(features)
    order = [number[space.feature] for space in spaces]
    if order == list(range(len(keys))):
        return features
    numbers_of_ids, numbers_of_bags = features.length_per_key(), features.stride_per_key()
    varies = features.variable_stride_per_key()

    def select(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([parts[i] for i in order])

    return KeyedJaggedTensor(
        keys=[space.feature for space in spaces],
        values=select(features.values().split(numbers_of_ids)),
        weights=select(features.weights().split(numbers_of_ids)) if weighted else None,
        lengths=select(features.lengths().split(numbers_of_bags)),
        stride=None if varies else features.stride(),
        stride_per_key_per_rank=[[numbers_of_bags[i]] for i in order] if varies else None,
        length_per_key=[numbers_of_ids[i] for i in order],
    )


def bounded_ids(ids: Tensor, space: IdSpace) -> Tensor:
    """Returns ``ids`` (N,) as int64, brought into [0, S) by the policy of ``space``.

    ``"error"`` raises, ``"clamp"`` returns min(max(id, 0), S - 1), ``"wrap"`` returns id mod S (never negative), and
    ``"unchecked"`` returns the id itself. On a CPU ``"error"`` checks the batch at once. On CUDA the host must not
    wait: ids are clamped, their extremes are copied to the host, and a later batch raises, at the latest
    `torchrec_qr.raise_pending`.

    Args:
        ids (Tensor): (N,) int32 or int64.
        space (IdSpace): the feature and the table.

    Raises:
        TypeError: ids are not integers.
        IndexError: an id is outside [0, S) under ``"error"``. The message has the table, the feature, the id and S.
    """
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
