"""The shared library of the operators of served models, loaded where it was built."""

import os
from functools import cache
from pathlib import Path

import torch

from torchrec_qr.ops.cpu_library import VARIABLE

_PATH = Path(__file__).with_name("_serving.so")


def operators_library() -> Path:
    """Returns the path of the library of operators, which a process loads before an exported model.

    The library needs PyTorch 2.11 or later and nothing else: ``torch.ops.load_library(path)`` in Python, ``dlopen`` in
    C++.

    Raises:
        FileNotFoundError: the library was not built.

    Example:
        >>> from torchrec_qr.inference import operators_library
        >>> operators_library().name
        '_serving.so'
    """
    if not _PATH.exists():
        raise FileNotFoundError(
            f"{_PATH.name}: it was not built; a wheel for Linux has it, or a C++17 compiler and PyTorch's headers at "
            "install time build it: pip install --no-build-isolation"
        )
    return _PATH


@cache
def load_operators() -> bool:
    """Loads the library, once, but not under ``TORCHREC_QR_CPU_KERNELS=off``. Returns whether it is loaded.

    Raises:
        ImportError: the library and the installed PyTorch do not fit.
    """
    if not _PATH.exists() or os.environ.get(VARIABLE) == "off":
        return False
    try:
        torch.ops.load_library(str(_PATH))
    except OSError as error:
        # The cause names the symbol, where PyTorch 2.14 names the path alone.
        needed, why = "the operators of served models need PyTorch 2.11 or later", error.__cause__ or error
        raise ImportError(f"{needed}, and do not load beside {torch.__version__}: {why}") from error
    return True


def status() -> str:
    """Returns, in a few words, what looks the tables of served models up on a CPU: the library, or PyTorch and why.

    "none" and why if importing the package fails for it.

    Example:
        >>> status()  # doctest: +SKIP
        'the operators of /usr/lib/python3.11/site-packages/torchrec_qr/ops/_serving.so'
    """
    if not _PATH.exists():
        return f"PyTorch, and exported models cannot be loaded: {_PATH.name} was not built"
    try:
        return f"the operators of {_PATH}" if load_operators() else f"PyTorch ({VARIABLE}=off)"
    except ImportError as error:
        return f"none: {error}"
