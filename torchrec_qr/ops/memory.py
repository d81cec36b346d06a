"""Memory of large tensors on a CPU."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """``torch.empty``, on Linux and a CPU in huge pages where the system grants them.

    Memory that was just allocated is granted page by page as it is first written: for what lives for a step, in pages
    of 4 KiB, that takes longer than the writing. Rows of a table are read at random, and with such pages nearly every
    one costs a walk of the page tables besides.

    Example:
        >>> empty((2, 2), torch.float32).shape
        torch.Size([2, 2])
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if _libc is not None and out.device.type == "cpu" and out.nbytes >= 2 * _HUGE_PAGE:
        page = mmap.PAGESIZE
        first, last = -(-out.data_ptr() // page) * page, (out.data_ptr() + out.nbytes) // page * page
        # A hint: that the system ignores it changes nothing but the time.
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return out


def zeros(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """``torch.zeros`` in the memory of `empty`.

    Example:
        >>> zeros((2, 2), torch.float32, None)
        tensor([[0., 0.],
                [0., 0.]])
    """
    return empty(shape, dtype, device).zero_()
