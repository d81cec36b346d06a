"""A compiler and a header that Triton lacks for its driver are named. None of this needs a GPU.

PyTorch is told that there is a GPU, so that Triton goes the way that it goes on one; it ends at its compiler.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from torchrec_qr.ops.triton_compiler import c_compiler, what_is_missing

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]

FIRST_LOOKUP = """
import sysconfig, torch
from torchrec_qr.ops import dispatch

torch.cuda.is_available = lambda: True
paths = sysconfig.get_paths
sysconfig.get_paths = lambda *a, **k: {{**paths(*a, **k), "include": {include!r}}}
try:
    dispatch.kernels_on(torch.device("cuda"))
except Exception as error:
    print(type(error).__name__, error, sep=": ")
"""


def program(folder: Path, name: str, source: str) -> str:
    (folder / name).write_text(f"#!/bin/sh\n{source}\n")
    (folder / name).chmod(0o755)
    return str(folder)


def first_lookup(cache: Path, path: str, include: Path | None = None, **environment: str) -> str:
    """Returns what the first lookup on a GPU says, on a machine with an empty cache and these programs and headers."""
    if include is None:
        include = cache
        (cache / "Python.h").write_text("")
    given = {
        "PYTHONPATH": str(ROOT),
        "PATH": path,
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TRITON_LIBCUDA_PATH": str(cache),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FIRST_LOOKUP.format(include=str(include)))],
        env=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_first_lookup_names_a_missing_compiler(tmp_path: Path) -> None:
    assert first_lookup(tmp_path, "") == (
        "RuntimeError: Triton compiles its driver at the first lookup on a GPU, and lacks a C compiler (neither gcc "
        "nor clang on PATH). Debian, Ubuntu: apt-get install gcc; RHEL, Fedora: dnf install gcc; or name one in CC"
    )


@pytest.mark.slow
def test_the_first_lookup_names_a_compiler_that_is_named_and_not_there(tmp_path: Path) -> None:
    assert "lacks a C compiler (CC=/opt/icc is not there)." in first_lookup(tmp_path, "", CC="/opt/icc")


@pytest.mark.slow
def test_the_first_lookup_names_a_missing_header(tmp_path: Path) -> None:
    path = program(tmp_path, "gcc", "exit 1")
    said = first_lookup(tmp_path, path, include=Path("/nowhere"))
    assert said.startswith("RuntimeError: Triton compiles its driver at the first lookup on a GPU, and lacks Python.h")
    assert "(/nowhere/Python.h is not there). Debian, Ubuntu: apt-get install python3-dev" in said


@pytest.mark.slow
def test_another_error_stays_as_it_is(tmp_path: Path) -> None:
    assert first_lookup(tmp_path, program(tmp_path, "gcc", "exit 1")).startswith("CalledProcessError: ")


def test_the_compiler_is_the_one_that_triton_takes(tmp_path: Path) -> None:
    assert c_compiler({"PATH": str(tmp_path)}) is None
    program(tmp_path, "clang", "")
    assert c_compiler({"PATH": str(tmp_path)}) == f"{tmp_path}/clang"
    program(tmp_path, "gcc", "")
    assert c_compiler({"PATH": str(tmp_path)}) == f"{tmp_path}/gcc"
    assert c_compiler({"PATH": str(tmp_path), "CC": "clang"}) == f"{tmp_path}/clang"
    assert c_compiler({"PATH": os.environ["PATH"], "CC": f"{tmp_path}/gcc"}) == f"{tmp_path}/gcc"


def test_both_are_named_where_both_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda **_: {"include": str(tmp_path)})
    missing = str(what_is_missing({"PATH": ""}))
    assert "a C compiler (neither gcc nor clang on PATH)" in missing
    assert f"; Python.h ({tmp_path}/Python.h is not there)" in missing
    (tmp_path / "Python.h").write_text("")
    program(tmp_path, "gcc", "")
    assert what_is_missing({"PATH": str(tmp_path)}) is None
