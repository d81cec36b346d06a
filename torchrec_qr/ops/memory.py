"""Memory of large tables."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def zeros(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """``torch.zeros``, on Linux and a CPU in huge pages where the system grants them.

    Rows are read at random: with pages of 4 KiB nearly every one costs a walk of the page tables besides.

    Example:
        >>> zeros((2, 2), torch.float32, None)
        tensor([[0., 0.],
                [0., 0.]])
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.device.type == "cpu" and sys.platform == "linux" and out.nbytes >= 2 * _HUGE_PAGE:
        page = mmap.PAGESIZE
        first, last = -(-out.data_ptr() // page) * page, (out.data_ptr() + out.nbytes) // page * page
        # A hint: that the system ignores it changes nothing but the time.
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return out.zero_()
