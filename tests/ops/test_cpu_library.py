"""Which of kernels and PyTorch looks tables up, and how that is said; what the library does to the process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.backends import cpu

SCRIPT = """
import sys, warnings
from pathlib import Path
import torch
from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.backends import cpu
cpu_library._PATH = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print([cpu.available() for _ in range(3)], len(caught), *(w.message for w in caught))
print(cpu_library.status())
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def test_without_a_library_one_warning_and_pytorch(tmp_path: Path) -> None:
    first, status = run(SCRIPT, str(tmp_path / "none.so")).splitlines()
    assert re.match(r"\[False, False, False\] 1 torchrec_qr looks tables up with PyTorch.*were not built", first)
    assert status.startswith("PyTorch, several times slower than the kernels: they were not built")


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    first, status = run(SCRIPT, str(broken)).splitlines()
    assert first.startswith("[False, False, False] 1 ")
    assert "could not be loaded" in status


def test_switched_off_without_a_warning() -> None:
    first, status = run(SCRIPT, str(cpu_library._PATH), **{cpu_library.VARIABLE: "off"}).splitlines()
    assert first == "[False, False, False] 0"
    assert status == f"PyTorch ({cpu_library.VARIABLE}=off)"


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "sse9")
    with pytest.raises(ValueError, match="TORCHREC_QR_CPU_KERNELS='sse9'; allowed: auto, off, baseline, avx2, avx512"):
        cpu_library.library()


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
def test_the_process_keeps_its_subnormals() -> None:
    """A library that is linked with -ffast-math would flush them to zero for everyone."""
    assert float(torch.tensor(1e-40) * 0.5) > 0


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
@pytest.mark.parametrize("isa", cpu_library.ISAS)
def test_the_status_names_what_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, isa)
    library = cpu_library.library()
    assert library is not None
    usable = cpu_library.ISAS[min(cpu_library.ISAS.index(isa), library.qr_best_isa())]
    assert cpu_library.status() == f"kernels ({usable})"


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
def test_a_library_of_other_structs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu_library.library()
    monkeypatch.setattr(library, "checked", False)
    monkeypatch.setattr(cpu, "STRUCTS", cpu.STRUCTS[::-1])
    with pytest.raises(RuntimeError, match="built for another version of torchrec_qr"):
        cpu.available()
