"""CUDA devices that do nothing, for a process that has not imported torch yet: ``noop_cuda.cpp``, built and loaded."""

import ctypes
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

COMPILER = os.environ.get("CXX", "g++")


def load() -> ctypes.CDLL:
    """Loads the library, then torch; returns the library, whose devices are the process's."""
    assert "torch" not in sys.modules, "torch looks its hooks up when it is loaded: load the library first"
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(_built(Path(folder))), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    library.register_guard()
    return library


def _built(folder: Path) -> Path:
    """Builds the library for the torch at hand, which takes two seconds."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch, library = Path(spec.origin).parent, folder / "noop_cuda.so"
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", str(Path(__file__).with_suffix(".cpp")), "-o", str(library)]
    command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return library
