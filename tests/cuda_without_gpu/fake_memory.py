"""Addresses and integer values of fake tensors, which have neither."""

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Memory:
    """Addresses and integer values of fake tensors, by their storages.

    A storage that is freed may come again under the same number; whoever makes a tensor writes its values.
    """

    def __init__(self) -> None:
        self._address_of: dict[int, int] = {}
        self._values_of: dict[int, Tensor] = {}
        self._pinned: set[int] = set()

    def address(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        base = self._address_of.setdefault(key, 0x7F0000000000 + len(self._address_of) * (1 << 30))
        return base + tensor.storage_offset() * tensor.element_size()

    def values(self, tensor: Tensor) -> Tensor:
        """The values as a tensor on the CPU that shares its memory with those of views; ones where none are known."""
        with no_dispatch():
            if tensor.dtype not in INTEGERS:
                return torch.ones(tensor.shape, dtype=tensor.dtype)
            known = self._values_of.get(tensor.untyped_storage()._cdata)
            if known is None or known.dtype != tensor.dtype:
                known = torch.ones(_extent(tensor), dtype=tensor.dtype)
                self._values_of[tensor.untyped_storage()._cdata] = known
            return known.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Gives a tensor, whose storage is its own, its values; unless a kernel of the CPU gives it another shape."""
        if values.shape != tensor.shape:
            return
        with no_dispatch():
            known = torch.ones(_extent(tensor), dtype=tensor.dtype)
            known.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(values)
            self._values_of[tensor.untyped_storage()._cdata] = known

    def forget(self, tensor: Tensor) -> None:
        self._values_of.pop(tensor.untyped_storage()._cdata, None)
        self._pinned.discard(tensor.untyped_storage()._cdata)

    def pin(self, tensor: Tensor) -> None:
        self._pinned.add(tensor.untyped_storage()._cdata)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned


def _extent(tensor: Tensor) -> int:
    """How many numbers a tensor's storage holds."""
    return max(int(tensor.untyped_storage().nbytes()) // tensor.element_size(), 1)
