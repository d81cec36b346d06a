"""Memory that does not suffice, by the name of who wanted it."""

import re
from pathlib import Path

import torch
from torch import Tensor

from torchrec_qr.ops.memory import zeros

_MEMINFO = Path("/proc/meminfo")


def named_zeros(what: str, shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """`torchrec_qr.ops.memory.zeros`, whose failure names what wanted the memory.

    Raises:
        OutOfMemoryError: torch's, on every device; names ``what``, the bytes that it wanted and those that are free.

    Example:
        >>> named_zeros("table 't', partition 0", (2**46, 4), torch.uint8, None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        torch.OutOfMemoryError: table 't', partition 0: (70368744177664, 4) of uint8 wants 256.0 TiB of ...
    """
    try:
        return zeros(shape, dtype, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        at = torch.device("cpu") if device is None else torch.device(device)
        wanted = torch.Size([shape] if isinstance(shape, int) else shape).numel() * dtype.itemsize
        described = f"{tuple(shape) if not isinstance(shape, int) else shape} of {str(dtype).removeprefix('torch.')}"
        text = f"{what}: {described} wants {in_units(wanted)} of {at}, which has {free_text(at)} free"
        raise torch.OutOfMemoryError(text) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception is of memory that did not suffice: torch's own, or its CPU allocator's text."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def bytes_wanted(error: BaseException) -> str | None:
    """Returns the size of an allocation, in units, as torch's message has it; None: the message has none.

    Example:
        >>> bytes_wanted(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2048 bytes."))
        '2.0 KiB'
        >>> bytes_wanted(RuntimeError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity"))
        '20.50 GiB'
    """
    if found := re.search(r"[Tt]ried to allocate (\d+) bytes", str(error)):
        return in_units(int(found[1]))
    found = re.search(r"Tried to allocate (\d+(?:\.\d+)? \w+)|wants (\d+(?:\.\d+)? \w+) of", str(error))
    return None if found is None else found[1] or found[2]


def free_text(device: torch.device) -> str:
    """Returns a device's free memory, in units, or that it is not known."""
    free = _free_bytes(device)
    return "an unknown amount" if free is None else in_units(free)


def in_units(num_bytes: int) -> str:
    """Returns bytes as a person reads them.

    Example:
        >>> in_units(3), in_units(3 * 2**29), in_units(2**45)
        ('3 bytes', '1.5 GiB', '32.0 TiB')
    """
    size, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{num_bytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and _MEMINFO.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)
        return None if found is None else 1024 * int(found[1])
    return None
