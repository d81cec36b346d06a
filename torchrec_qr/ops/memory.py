"""Memory of large tensors on a CPU, which the system grants page by page as it is first written.

In pages of 4 KiB that takes longer than the writing, and rows read at random cost a walk of the page tables besides. So
large tensors lie in huge pages where the system has them, and those that live for a step in memory of earlier steps.
"""

import ctypes
import mmap
import sys
import weakref
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def zeros(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """``torch.zeros``, on Linux and a CPU in huge pages where the system grants them.

    Example:
        >>> zeros((2, 2), torch.float32, None)
        tensor([[0., 0.],
                [0., 0.]])
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if _libc is not None and out.device.type == "cpu" and out.nbytes >= 2 * _HUGE_PAGE:
        page = mmap.PAGESIZE
        first, last = -(-out.data_ptr() // page) * page, (out.data_ptr() + out.nbytes) // page * page
        # A hint: that the system ignores it changes nothing but the time.
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return out.zero_()


def recycled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on a CPU for what lives for a step; on Linux, if it is large, in memory that was freed before.

    As with any tensor, its memory is its own until the last tensor that shares its storage is gone. Only it cannot be
    resized.

    Example:
        >>> recycled((2, 2), torch.float32).shape
        torch.Size([2, 2])
    """
    out_bytes = torch.Size(shape).numel() * dtype.itemsize
    if sys.platform != "linux" or out_bytes < 2 * _HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    # The storage keeps this view alive, and nothing else does.
    memory = _take(out_bytes)
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=out_bytes // dtype.itemsize).view(shape)


class _Free(NamedTuple):
    memory: mmap.mmap
    number: int


# Oldest first. Changed by single operations of a list alone: tensors may be freed by any thread, at any time.
_free: list[_Free] = []
_given_back = 0
# How many of the latest to be given back are kept: more than a step has.
_KEPT = 64


def _take(num_bytes: int) -> mmap.mmap:
    for block in reversed(list(_free)):
        if num_bytes <= len(block.memory) <= 2 * num_bytes and _removed(block):
            return block.memory
    memory = mmap.mmap(-1, -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A hint here as well, which a system without huge pages refuses.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    global _given_back
    _given_back += 1
    _free.append(_Free(memory, _given_back))
    for block in list(_free):
        if block.number <= _given_back - _KEPT:
            _removed(block)


def _removed(block: _Free) -> bool:
    try:
        _free.remove(block)
    except ValueError:  # another thread has taken it
        return False
    return True
