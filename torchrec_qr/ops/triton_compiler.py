"""The C compiler that Triton needs at run time: it compiles its driver, a C file, at the first launch on a machine."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

_HOW = {
    "a C compiler": "Debian, Ubuntu: apt-get install gcc; RHEL, Fedora: dnf install gcc; or name one in CC",
    "Python.h": "Debian, Ubuntu: apt-get install python3-dev; RHEL, Fedora: dnf install python3-devel",
}


def c_compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the path of the compiler that Triton would take: that of CC, else gcc, else clang; None: there is none.

    Example:
        >>> from torchrec_qr.ops.triton_compiler import c_compiler
        >>> c_compiler({"PATH": "/nowhere"}) is None
        True
    """
    named = [environment["CC"]] if "CC" in environment else ["gcc", "clang"]
    return next((found for name in named if (found := shutil.which(name, path=environment.get("PATH")))), None)


def python_header() -> Path:
    """Returns where Python.h of this interpreter belongs, whether it is there or not, as Triton finds it."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own has a folder that it does not fill
    return Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"


def what_is_missing(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns what Triton lacks for its first launch on a GPU, and how to get it; None: nothing.

    Example:
        >>> from torchrec_qr.ops.triton_compiler import what_is_missing
        >>> print(what_is_missing({"PATH": "/nowhere", "CC": "icc"}))  # doctest: +ELLIPSIS
        a C compiler (CC=icc is not there...
    """
    missing = {}
    if c_compiler(environment) is None:
        looked_for = f"CC={environment['CC']} is not there" if "CC" in environment else "neither gcc nor clang on PATH"
        missing["a C compiler"] = looked_for
    if not python_header().is_file():
        missing["Python.h"] = f"{python_header()} is not there"
    if not missing:
        return None
    return "; ".join(f"{what} ({where}). {_HOW[what]}" for what, where in missing.items())


@lru_cache(maxsize=1)
def load_driver() -> None:
    """Has Triton make its driver for GPUs, as the first launch would; once a process, and nothing where no GPU is.

    Raises:
        RuntimeError: it needs a compiler or Python.h, which are missing. A driver that lies in Triton's cache already
            needs neither.
    """
    # Here, because `torchrec-qr doctor` imports this module where they may be missing.
    import torch

    if not torch.cuda.is_available():
        return
    from triton.runtime import driver

    try:
        _ = driver.active
    except Exception as error:
        missing = what_is_missing()
        if missing is None:
            raise
        raise RuntimeError(f"Triton compiles its driver at the first lookup on a GPU, and lacks {missing}") from error
