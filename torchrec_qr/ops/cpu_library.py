"""The shared library of CPU kernels: found, loaded and checked. Imports no torch, so that ``doctor`` can import it.

The environment variable ``TORCHREC_QR_CPU_KERNELS`` chooses: ``auto`` (default, the best that the machine has),
``avx512``, ``avx2``, ``baseline`` (at most that), or ``off``, which leaves lookups to PyTorch.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

VARIABLE = "TORCHREC_QR_CPU_KERNELS"
ISAS = ("baseline", "avx2", "avx512")
_PATH = Path(__file__).with_name("_kernels.so")
_forced_off = 0


@cache
def _loaded(path: Path) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not path.exists():
        return (
            "they were not built; a C++17 compiler at install time builds them, and a wheel for this platform has them"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"they could not be loaded: {error}"
    library.qr_best_isa.restype = ctypes.c_int32
    for name in ("qr_forward", "qr_backward"):
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        function.restype = ctypes.c_int32
    pointer = ctypes.c_void_p
    library.qr_step_rows.argtypes = [pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int32, pointer]
    library.qr_step_rows.restype = ctypes.c_int32
    library.qr_id_bounds.argtypes = [pointer, ctypes.c_int32, pointer, ctypes.c_int64, ctypes.c_int32, pointer]
    library.qr_id_bounds.restype = None
    return library


def library() -> ctypes.CDLL | None:
    """Returns the library, or None if PyTorch takes its place; warns once if nobody chose that.

    Raises:
        ValueError: ``TORCHREC_QR_CPU_KERNELS`` has none of its values.
    """
    if _forced_off or _choice() == "off":
        return None
    found = _loaded(_PATH)
    if isinstance(found, str):
        _warn_once(found)
        return None
    return found


def isa() -> int:
    """Returns the number in ``ISAS`` of the instruction set to use at most."""
    choice = _choice()
    return ISAS.index(choice) if choice in ISAS else len(ISAS) - 1


def status() -> str:
    """Returns, in a few words, what looks tables up on a CPU: the kernels' instruction set, or PyTorch and why.

    Example:
        >>> status()  # doctest: +SKIP
        'kernels (avx512)'
    """
    if _choice() == "off":
        return f"PyTorch ({VARIABLE}=off)"
    found = _loaded(_PATH)
    if isinstance(found, str):
        return f"PyTorch, several times slower than the kernels: {found}"
    return f"kernels ({ISAS[min(isa(), found.qr_best_isa())]})"


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within, lookups on a CPU are PyTorch's: to compare, and to find out which of the two is to blame.

    Example:
        >>> with without_kernels():
        ...     library() is None
        True
    """
    global _forced_off
    _forced_off += 1
    try:
        yield
    finally:
        _forced_off -= 1


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "off", *ISAS):
        raise ValueError(f"environment variable {VARIABLE}={choice!r}; allowed: auto, off, {', '.join(ISAS)}")
    return choice


@cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"torchrec_qr looks tables up with PyTorch, several times slower than with its CPU kernels: {why}",
        RuntimeWarning,
        stacklevel=4,
    )
