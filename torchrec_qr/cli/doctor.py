"""``torchrec-qr doctor``: do the installed torch, FBGEMM and TorchRec fit, and if not, what is to be installed?

The three are built for one another: a mismatch shows as an undefined symbol deep in an import, and pip does not prevent
it.
"""

import platform
import shutil
import subprocess
import sys

from torchrec_qr.cli.import_probe import MOST_SECONDS, ImportFailure, explain, try_imports, way_of_ending
from torchrec_qr.cli.installed_stack import Stack, version_of
from torchrec_qr.cli.stack_advice import described, is_tested, version_problem
from torchrec_qr.ops.triton_compiler import c_compiler, what_is_missing


def run() -> int:
    """Prints versions, then verdict and advice; returns 0 if the stack fits and imports, else 1.

    Example:
        >>> from torchrec_qr.cli import doctor
        >>> doctor.run()  # doctest: +SKIP
        component   version  build      import
        python      3.12.4
        torch       2.13.0   CUDA 13.0  ok
        fbgemm-gpu  1.8.0    CUDA       ok
        torchrec    1.8.0               ok
        triton      3.7.1
        torchx      0.7.0
        <BLANKLINE>
        OK: torch 2.13.0, fbgemm-gpu 1.8.0 and torchrec 1.8.0 fit together (tested).
        Lookups on a GPU: Triton's kernels, whose driver is compiled by /usr/bin/gcc.
        Lookups on a CPU: kernels (avx512).
        Lookups of served models: the operators of /venv/lib/python3.12/site-packages/torchrec_qr/ops/_serving.so.
        0
    """
    stack = Stack.installed()
    imported, failure = try_imports()
    print(_table(stack, imported, failure))
    print()
    # A wrong version explains the failure of an import, and its cure is the same.
    problem = version_problem(stack) or (failure and explain(failure, stack))
    # A missing compiler is a problem if there is a GPU, and a note if torch could use one.
    for_gpu, gpu = stack.torch_build not in ("", "CPU"), shutil.which("nvidia-smi") is not None
    on_gpu = _lookup_on_gpu() if for_gpu or gpu else None
    if for_gpu and gpu and what_is_missing():
        problem = problem or on_gpu
    served = "" if problem else _status_of("serving_library")
    if served.startswith("none: "):
        problem = served.removeprefix("none: ")
    if problem:
        print(f"PROBLEM: {problem}")
        return 1
    how = "tested" if is_tested(stack) else "by their numbers; this trio is not tested"
    print(f"OK: {described(stack)} fit together ({how}).")
    if on_gpu:
        print(f"Lookups on a GPU: {on_gpu}.")
    print(f"Lookups on a CPU: {_status_of('cpu_library')}.")
    print(f"Lookups of served models: {served}.")
    return 0


def _lookup_on_gpu() -> str:
    """Returns what looks tables up on a GPU, or what that lacks on this machine."""
    if missing := what_is_missing():
        return f"Triton compiles its driver at the first lookup on a GPU, and lacks {missing}"
    return f"Triton's kernels, whose driver is compiled by {c_compiler()}"


def _status_of(library: str) -> str:
    """Returns what looks tables up on a CPU: a library of ``torchrec_qr.ops``, or PyTorch and why.

    A process of its own answers, after the import of torch, because the libraries take symbols of torch's.
    """
    asked = subprocess.run(
        [sys.executable, "-c", f"import torch; from torchrec_qr.ops import {library}; print({library}.status())"],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    lines = asked.stdout.splitlines()
    if asked.returncode or not lines:
        return f"PyTorch: loading the library ended with {way_of_ending(asked.returncode)}"
    return lines[-1]


def _table(stack: Stack, imported: list[str], failure: ImportFailure | None) -> str:
    def outcome(module: str) -> str:
        if module in imported:
            return "ok"
        return "FAILED" if failure is not None and failure.module == module else "not tried"

    rows = [
        ("component", "version", "build", "import"),
        ("python", platform.python_version(), "", ""),
        ("torch", stack.torch, stack.torch_build, outcome("torch")),
        *(
            (name, version, "CPU" if name == "fbgemm-gpu-cpu" else "CUDA", outcome("fbgemm_gpu"))
            for name, version in stack.fbgemm.items()
        ),
        ("torchrec", stack.torchrec, "", outcome("torchrec")),
        ("triton", version_of("triton"), "", ""),
        ("torchx", version_of("torchx"), "", ""),
    ]
    cells = [[cell or ("-" if column == 1 else "") for column, cell in enumerate(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
