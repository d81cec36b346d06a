"""The batch of a lookup: consecutive features of a ``KeyedJaggedTensor``."""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_qr.ids import IdSpace, bounded_ids, check_type, raise_if_outside
from torchrec_qr.ops.arguments import Batch
from torchrec_qr.ops.backends import cpu
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.dispatch import kernels_take
from torchrec_qr.ops.transforms import is_traced, is_transformed


def batch_of(features: KeyedJaggedTensor, first: int, num_features: int, pooled: bool, weighted: bool) -> Batch:
    """Returns the features [first, first + num_features) of a batch. Pooled ones have one number of bags."""
    weights = features.weights() if weighted else None
    if pooled and num_features == len(features.keys()):
        # Do not sum lengths up to the numbers of ids, because the host would wait for a GPU.
        starts = None if features.length_per_key_or_none() is None else features.offset_per_key()
        return Batch(features.values(), features.offsets(), weights, pooled, starts)
    of_all: list[int] = features.offset_per_key()
    span = slice(of_all[first], of_all[first + num_features])
    starts = [start - span.start for start in of_all[first : first + num_features + 1]]
    if pooled:
        bags = features.stride()
        offsets = features.offsets()[first * bags : (first + num_features) * bags + 1]
        offsets = offsets - span.start if span.start else offsets
    else:
        offsets = torch.tensor(starts)
    return Batch(features.values()[span], offsets, None if weights is None else weights[span], pooled, starts)


def in_range(
    features: KeyedJaggedTensor, spaces: list[IdSpace], lookups: list[tuple[Description, list[Tensor]]]
) -> KeyedJaggedTensor:
    """Returns a batch whose ids are int64 and in [0, S), by the policy of the id space of each feature.

    Args:
        features (KeyedJaggedTensor): the batch.
        spaces (list[IdSpace]): the id space of each feature.
        lookups (list[tuple[Description, list[Tensor]]]): the tables and weights of each lookup of the features.

    Raises:
        TypeError: ids are not integers.
        IndexError: see `torchrec_qr.ids.bounded_ids`.
    """
    ids = features.values()
    check_type(ids, spaces[0])
    has_memory = ids.device.type == "cpu" and not is_transformed() and not is_traced(ids)
    if has_memory and cpu.available():
        for space, (low, high) in zip(spaces, cpu.id_bounds(ids, features.offset_per_key()), strict=True):
            if space.out_of_range == "error" and low <= high:
                raise_if_outside(low, high, space)
        are_checked = [True] * len(spaces)
    else:
        # The kernels of a GPU check each id.
        are_checked = [ids.is_cuda and kernels_take(*of) for of in lookups for _ in of[0].dims]
    stay = [
        space.out_of_range == "unchecked" or (space.out_of_range == "error" and is_checked)
        for space, is_checked in zip(spaces, are_checked, strict=True)
    ]
    if all(stay):
        bounded = ids.to(torch.int64)
        if bounded is ids:
            return features
    else:
        parts = zip(ids.split(features.length_per_key()), spaces, stay, strict=True)
        bounded = torch.cat([own.to(torch.int64) if as_is else bounded_ids(own, space) for own, space, as_is in parts])
    varies = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=bounded,
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=features.offsets_or_none(),
        stride=None if varies else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if varies else None,
        length_per_key=features.length_per_key_or_none(),
    )
