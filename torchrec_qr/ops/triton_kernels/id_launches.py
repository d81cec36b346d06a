"""The launch that prepares the ids of a batch for sending. Nothing here waits for the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..arguments import SentFeature
from . import sent_ids as fields_of_kernel
from .backward_launches import kept_on_device
from .device_tables import magic
from .id_rows import NO_FAILURE
from .launcher import launch
from .launches import stream_of
from .sent_ids import send_ids

_POLICIES = {
    "unchecked": fields_of_kernel.UNCHECKED.value,
    "error": fields_of_kernel.ERROR.value,
    "clamp": fields_of_kernel.CLAMP.value,
    "wrap": fields_of_kernel.WRAP.value,
}
_BLOCK = 256


class Sent(NamedTuple):
    """(N,) int64 as they are sent, and what `report` in `id_rows` has left, (1,) int64."""

    ids: Tensor
    failure: Tensor


def fields_of(features: Sequence[SentFeature]) -> tuple[int, ...]:
    """Returns the descriptors of features, whose class maps stay where they lie."""
    return tuple(field for feature in features for field in _fields(feature))


def _fields(feature: SentFeature) -> tuple[int, ...]:
    per_row, stride, size = feature.code[:3] if feature.code is not None else (0, 0, 0)
    of_map, hashed = feature.class_map, feature.hash_seed is not None
    policy = fields_of_kernel.HASHED.value if hashed else _POLICIES[feature.out_of_range]
    return (
        *(policy, feature.num_ids, *magic(feature.num_ids), per_row),
        *(stride, *magic(max(stride, 1)), size, *magic(max(size, 1))),
        *(0 if of_map is None else of_map.data_ptr(), int(of_map is not None and of_map.dtype == torch.int64)),
        feature.hash_offset,
    )


def send(fields: tuple[int, ...], ids: Tensor, offsets: Tensor, most_ids: int) -> Sent:
    """Returns what is sent of ``ids`` (N,), feature after feature, by their offsets (F·B + 1,).

    Args:
        fields: see `fields_of`.
        ids: (N,) int32 or int64.
        offsets: (F·B + 1,) int32 or int64.
        most_ids: the number of ids of the feature with most.
    """
    device, num_features = ids.device, len(fields) // fields_of_kernel.FEATURE_FIELDS.value
    sent = torch.empty(ids.shape, dtype=torch.int64, device=device)
    failure = torch.full((1,), NO_FAILURE.value, dtype=torch.int64, device=device)
    features = kept_on_device(fields, torch.int64, device, stream_of(device))
    num_bags = (offsets.numel() - 1) // num_features
    arguments = (sent, failure, ids.contiguous(), offsets.contiguous(), features, num_bags, ids.numel())
    launch(send_ids, (triton.cdiv(most_ids, _BLOCK), num_features), arguments, (_BLOCK,), 4)
    return Sent(sent, failure)
