"""Kernels or PyTorch look tables up, the status names which, and the library leaves the process as it was."""

import warnings
from pathlib import Path

import pytest
import torch

from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.backends import cpu


def warnings_of_three_lookups() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [cpu.available() for _ in range(3)] == [False] * 3
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("content", "why"), [(None, "they were not built"), (b"not a library", "they could not be loaded")]
)
def test_without_a_library_one_warning_and_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, why: str
) -> None:
    path = tmp_path / "kernels.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(cpu_library, "_PATH", path)
    (warning,) = warnings_of_three_lookups()
    assert warning.startswith("torchrec_qr looks tables up with PyTorch, ")
    assert why in warning
    assert cpu_library.status().startswith(f"PyTorch, several times slower than the kernels: {why}")


def test_switched_off_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_library.VARIABLE, "off")
    assert warnings_of_three_lookups() == []
    assert cpu_library.status() == f"PyTorch ({cpu_library.VARIABLE}=off)"


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
