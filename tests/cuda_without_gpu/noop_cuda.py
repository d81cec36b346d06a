"""CUDA devices that do nothing, for a process that has not imported torch yet: ``noop_cuda.cpp``, built and loaded."""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def load() -> ctypes.CDLL:
    """Loads the library before torch, then torch; returns the library, whose devices are the process's."""
    assert "torch" not in sys.modules, "torch looks its hooks up when it is loaded: load the library first"
    library = ctypes.CDLL(str(built()), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    library.register_guard()
    return library


def built() -> Path:
    """The library for the torch at hand, from a cache in the temporary folder where an earlier process built it."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + bytes(torch) + (torch / "version.py").read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"torchrec_qr-noop-cuda-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        # Under a name of its own until it is whole, because other processes may build it at the same time.
        unfinished = folder / f"{key}.{os.getpid()}"
        command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(unfinished)]
        command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        command += [f"-Wl,-rpath,{torch / 'lib'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        unfinished.replace(library)
    return library
