"""Copies of explicit maps on devices: one per map and device, however many tables, shards and input dists read it."""

from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from torchrec_qr.partitions.base import Partitions

# A copy lives as long as somebody holds it.
_copies: WeakKeyDictionary[Partitions, WeakValueDictionary[torch.device, Tensor]] = WeakKeyDictionary()


def class_map_on(partitions: Partitions, device: torch.device | None) -> Tensor | None:
    """Returns the class map (K, S) of ``partitions`` on a device, default the CPU; None for closed forms.

    Not to be written to: equal partitions share it.

    Example:
        >>> from torchrec_qr import ExplicitPartitions
        >>> p = ExplicitPartitions([[0, 0, 1], [0, 1, 1]])
        >>> class_map_on(p, torch.device("meta")) is class_map_on(p, torch.device("meta"))
        False
        >>> class_map_on(p, None) is p.class_map
        True
    """
    class_map = partitions.class_map
    if class_map is None or device is None or device == class_map.device:
        return class_map
    if device.type == "meta":
        return class_map.to(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    copies = _copies.setdefault(partitions, WeakValueDictionary())
    copy = copies.get(device)
    if copy is None:
        copies[device] = copy = class_map.to(device)
    return copy
