"""``torchrec-qr doctor``, run as a user does: in a process, against environments made of real files."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from torchrec_qr.cli.installed_stack import Stack
from torchrec_qr.cli.stack_advice import TESTED, TORCHREC_NEEDS, Trio, version_problem
from torchrec_qr.ops import cpu_library, serving_library
from torchrec_qr.ops.serving_library import load_operators, operators_library

ROOT = Path(__file__).parents[1]
TORCH = """
class _Operators:
    asynchronous_complete_cumsum = None
class ops:
    fbgemm = _Operators
"""
BUILD = "from typing import Optional\n__version__ = {!r}\ncuda: Optional[str] = {}\nhip: Optional[str] = None\n"
LOADED_BY_TORCH_2_14 = """
import ctypes
try:
    ctypes.CDLL({!r})
except OSError as error:
    raise OSError("Could not load this library: /site/fbgemm_gpu_py.so") from error
"""
UNDEFINED = "raise ImportError('/site/fbgemm_gpu_py.so: undefined symbol: _ZN3c104impl12PyObjectSlotC1Ev')"


class Environment:
    """An empty virtual environment, into which distributions are written as pip would: metadata and modules."""

    def __init__(self, path: Path) -> None:
        venv.create(path, symlinks=True)
        self._python = path / "bin" / "python"
        (self._site,) = path.glob("lib/python*/site-packages")

    def place(self, name: str, version: str, **modules: str) -> None:
        """Writes a distribution's metadata, and the source of its modules by name."""
        info = self._site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for module, source in modules.items():
            (self._site / module).mkdir()
            (self._site / module / "__init__.py").write_text(source)

    def place_stack(
        self,
        torch: str = "2.13.0",
        fbgemm: str = "1.8.0",
        torchrec: str = "1.8.0",
        cuda: bool = False,
        torch_source: str = TORCH,
        fbgemm_source: str | None = "",
        torchrec_source: str = "",
    ) -> None:
        """Writes distributions of the three versions, by default a trio that fits; no module if its source is None."""
        self.place("torch", torch, torch=torch_source)
        if "+" not in torch:
            build = BUILD.format(torch, "'13.0'" if cuda else None)
            (self._site / "torch" / "version.py").write_text(build)
        modules = {} if fbgemm_source is None else {"fbgemm_gpu": fbgemm_source}
        self.place("fbgemm-gpu" if cuda else "fbgemm-gpu-cpu", fbgemm, **modules)
        self.place("torchrec", torchrec, torchrec=torchrec_source)

    def doctor(self, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``torchrec-qr doctor`` here; without PATH, so that the machine's own GPU plays no part."""
        return subprocess.run(
            [self._python, "-m", "torchrec_qr.cli", "doctor"],
            env={"PYTHONPATH": str(ROOT), "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def problems_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns the problems that a run reported. Checks that its exit code agrees."""
    problems = [line.removeprefix("PROBLEM: ") for line in result.stdout.splitlines() if line.startswith("PROBLEM: ")]
    assert result.stderr == ""
    assert result.returncode == bool(problems)
    assert bool(problems) != ("\nOK: " in result.stdout)
    return problems


def test_this_environment_fits() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "torchrec_qr.cli", "doctor"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert problems_of(result) == []
    table = {row[0]: row[1:] for line in result.stdout.splitlines() if (row := line.split())}
    assert table["torch"][0] == metadata.version("torch")
    assert table["torchrec"] == [metadata.version("torchrec"), "ok"]
    assert table["triton"] == [metadata.version("triton")]
    assert table["torchx"] == [metadata.version("torchx")]
    assert result.stdout.splitlines()[-2:] == [
        f"Lookups on a CPU: {cpu_library.status()}.",
        f"Lookups of served models: {serving_library.status()}.",
    ]
    if load_operators():
        assert serving_library.status() == f"the operators of {operators_library()}"
    else:
        assert serving_library.status().startswith("PyTorch")


def test_nothing_installed(environment: Environment) -> None:
    assert problems_of(environment.doctor()) == [
        "torch, fbgemm-gpu-cpu and torchrec are not installed. Run: pip install torch==2.14.1 fbgemm-gpu-cpu==1.9.0 && "
        "pip install --no-deps torchrec==1.9.2 && "
        "pip install iopath pyre-extensions tensordict torchmetrics==1.0.3 tqdm"
    ]


def test_fitting_stack(environment: Environment) -> None:
    # The doctor hides what a module prints while it is imported.
    environment.place_stack(fbgemm_source="import os; print('loading'); os.system('echo loaded')")
    result = environment.doctor()
    assert problems_of(result) == []
    assert [line.split() for line in result.stdout.splitlines()[2:5]] == [
        ["torch", "2.13.0", "CPU", "ok"],
        ["fbgemm-gpu-cpu", "1.8.0", "CPU", "ok"],
        ["torchrec", "1.8.0", "ok"],
    ]
    verdict, lookups, served = result.stdout.splitlines()[-3:]
    assert verdict == "OK: torch 2.13.0, fbgemm-gpu-cpu 1.8.0 and torchrec 1.8.0 fit together (tested)."
    assert re.fullmatch(
        r"Lookups on a CPU: (kernels \((baseline|avx2|avx512)\)|PyTorch, several times slower.*)\.", lookups
    )
    assert served.startswith("Lookups of served models: PyTorch")  # this torch loads no libraries


def test_newer_trio_that_fits_by_its_numbers(environment: Environment) -> None:
    environment.place_stack("2.15.1", "1.10.0", "1.10.2")
    result = environment.doctor()
    assert problems_of(result) == []
    assert result.stdout.splitlines()[-3].endswith("fit together (by their numbers; this trio is not tested).")


def test_fbgemm_of_another_torch(environment: Environment) -> None:
    environment.place_stack("2.13.0+cpu", "1.9.0", fbgemm_source=UNDEFINED)
    result = environment.doctor()
    assert problems_of(result) == [
        "torch 2.13.0+cpu, fbgemm-gpu-cpu 1.9.0 and torchrec 1.8.0 do not fit together. "
        "Run: pip install fbgemm-gpu-cpu==1.8.0"
    ]
    assert re.search(r"^fbgemm-gpu-cpu +1\.9\.0 +CPU +FAILED$", result.stdout, re.MULTILINE)
    assert re.search(r"^torchrec +1\.8\.0 +not tried$", result.stdout, re.MULTILINE)


def test_both_fbgemm_distributions(environment: Environment) -> None:
    environment.place_stack()
    environment.place("fbgemm-gpu", "1.8.0")
    assert problems_of(environment.doctor()) == [
        "fbgemm-gpu 1.8.0 and fbgemm-gpu-cpu 1.8.0 are both installed, and overwrite each other's files. "
        "Run: pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install fbgemm-gpu-cpu==1.8.0"
    ]


REINSTALL = "pip install --force-reinstall --no-deps"


@pytest.mark.parametrize(
    ("stack", "problem"),
    [
        pytest.param(
            {"torch": "2.14.1+cpu", "fbgemm": "1.9.0"},
            "torch 2.14.1+cpu, fbgemm-gpu-cpu 1.9.0 and torchrec 1.8.0 do not fit together. "
            "Run: pip install --no-deps torchrec==1.9.2",
            id="torchrec-of-another-fbgemm",
        ),
        pytest.param(
            {"torch": "2.13.0+cpu", "cuda": True, "fbgemm_source": UNDEFINED},
            "fbgemm-gpu 1.8.0 is built for CUDA, and torch 2.13.0+cpu without. "
            "Run: pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu==1.8.0",
            id="cuda-fbgemm-beside-cpu-torch",
        ),
        pytest.param(
            {"torch": "2.13.0+cpu", "torch_source": "import ctypes; ctypes.CDLL('libtorch_cpu.so')"},
            "torch lacks libtorch_cpu.so, a part of the stack itself. Run: pip install --force-reinstall torch==2.13.0",
            id="torch-is-reinstalled-with-its-libraries",
        ),
        pytest.param(
            {"fbgemm_source": None},
            "fbgemm_gpu is listed as installed, but its files are not there. "
            f"Run: {REINSTALL} fbgemm-gpu-cpu==1.8.0 && {REINSTALL} torchrec==1.8.0",
            id="files-are-gone",
        ),
        pytest.param(
            {"cuda": True, "fbgemm_source": UNDEFINED},
            "fbgemm_gpu was built for another build of PyTorch than torch 2.13.0 (/site/fbgemm_gpu_py.so: undefined "
            f"symbol: _ZN3c104impl12PyObjectSlotC1Ev). Run: {REINSTALL} fbgemm-gpu==1.8.0 torchrec==1.8.0",
            id="undefined-symbol",
        ),
        pytest.param(
            {"cuda": True, "fbgemm_source": "import ctypes; ctypes.CDLL('libcudart.so.99')"},
            "fbgemm-gpu needs CUDA's libcudart.so.99, which is not on this machine. For a machine without a GPU "
            "run: pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu==1.8.0",
            id="missing-cuda-library",
        ),
        pytest.param(
            {"cuda": True, "fbgemm_source": LOADED_BY_TORCH_2_14.format("libnvidia-ml.so.99")},
            "fbgemm-gpu needs CUDA's libnvidia-ml.so.99, which is not on this machine. For a machine without a GPU "
            "run: pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu==1.8.0",
            id="missing-cuda-library-behind-the-path-of-another",
        ),
        pytest.param(
            {"cuda": True, "fbgemm_source": "import ctypes; ctypes.CDLL('libgone.so.1')"},
            "fbgemm_gpu needs the shared library libgone.so.1, which is not on this machine: install the system "
            "package that has it (libgomp.so.1: apt-get install libgomp1).",
            id="missing-system-library",
        ),
        pytest.param(
            {"cuda": True, "fbgemm_source": "import torch; del torch.ops.fbgemm.asynchronous_complete_cumsum"},
            "fbgemm_gpu imports, but its operators did not load (type object '_Operators' has no attribute "
            f"'asynchronous_complete_cumsum'). Run: {REINSTALL} fbgemm-gpu==1.8.0 torchrec==1.8.0",
            id="operators-not-loaded",
        ),
        pytest.param(
            {"cuda": True, "fbgemm_source": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"},
            "importing fbgemm_gpu killed Python (SIGSEGV), as libraries of different builds do. "
            f"Run: {REINSTALL} fbgemm-gpu==1.8.0 torchrec==1.8.0",
            id="crash",
        ),
        pytest.param(
            {
                "cuda": True,
                "fbgemm_source": "raise RuntimeError('operator torchvision::nms does not exist\\nlong story')",
            },
            "importing fbgemm_gpu raised RuntimeError: operator torchvision::nms does not exist. "
            f"To install it anew, run: {REINSTALL} fbgemm-gpu==1.8.0 torchrec==1.8.0",
            id="other-error",
        ),
    ],
)
def test_a_stack_that_does_not_work(environment: Environment, stack: dict[str, Any], problem: str) -> None:
    environment.place_stack(**stack)
    assert problems_of(environment.doctor()) == [problem]


@pytest.mark.parametrize(("module", "package"), [*TORCHREC_NEEDS.items(), ("typing_inspect", "typing-inspect")])
def test_torchrec_without_its_requirements(environment: Environment, module: str, package: str) -> None:
    environment.place_stack(torchrec_source=f"import {module}.part")
    assert problems_of(environment.doctor()) == [
        f"torchrec needs the module {module}, which is not installed. Run: pip install {package}"
    ]


NO_COMPILER = (
    "Triton compiles its driver at the first lookup on a GPU, and lacks a C compiler (neither gcc nor clang on PATH). "
    "Debian, Ubuntu: apt-get install gcc; RHEL, Fedora: dnf install gcc; or name one in CC"
)


def _programs(folder: Path, *names: str) -> str:
    """Writes programs that do nothing; returns their folder."""
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


def _on_gpu(result: subprocess.CompletedProcess[str]) -> str | None:
    lines = [line for line in result.stdout.splitlines() if line.startswith("Lookups on a GPU: ")]
    return lines[0].removeprefix("Lookups on a GPU: ") if lines else None


def test_a_gpu_without_a_compiler_is_a_problem(environment: Environment, tmp_path: Path) -> None:
    environment.place_stack(cuda=True)
    assert problems_of(environment.doctor(_programs(tmp_path, "nvidia-smi"))) == [NO_COMPILER]
    result = environment.doctor(_programs(tmp_path, "gcc"))
    assert problems_of(result) == []
    assert _on_gpu(result) == f"Triton's kernels, whose driver is compiled by {tmp_path}/gcc."


def test_a_cuda_build_without_a_gpu_is_told_what_one_would_lack(environment: Environment, tmp_path: Path) -> None:
    environment.place_stack(cuda=True)
    result = environment.doctor()
    assert problems_of(result) == []
    assert _on_gpu(result) == f"{NO_COMPILER}."
    result = environment.doctor(CC="/opt/icc")
    assert "lacks a C compiler (CC=/opt/icc is not there). Debian" in str(_on_gpu(result))


def test_a_cpu_build_needs_no_compiler(environment: Environment) -> None:
    environment.place_stack()
    result = environment.doctor()
    assert problems_of(result) == []
    assert _on_gpu(result) is None


def test_a_wrong_version_comes_before_a_missing_compiler(environment: Environment, tmp_path: Path) -> None:
    environment.place_stack(fbgemm="1.9.0", cuda=True)
    (problem,) = problems_of(environment.doctor(_programs(tmp_path, "nvidia-smi")))
    assert "do not fit together" in problem


def _run_pip(stack: Stack, command: str) -> Stack:
    """Returns the stack after one ``pip`` command, which may change FBGEMM, torch and TorchRec."""
    _, action, *arguments = shlex.split(command)
    names = [argument for argument in arguments if not argument.startswith("-")]
    if action == "uninstall":
        return replace(stack, fbgemm={name: version for name, version in stack.fbgemm.items() if name not in names})
    for requirement in names:
        name, _, version = requirement.partition("==")
        version = version.replace("*", "0")
        if name in ("torch", "torchrec"):
            stack = replace(stack, **{name: version})
        elif name.startswith("fbgemm"):
            stack = replace(stack, fbgemm={**stack.fbgemm, name: version})
    if any(name.startswith("torchrec==") for name in names) and "--no-deps" not in arguments:
        stack = replace(stack, fbgemm={"fbgemm-gpu": "newest", **stack.fbgemm})
    return stack


@pytest.mark.parametrize("build", ["CPU", "CUDA 13.0"])
def test_advice_leads_to_a_stack_that_fits(build: str) -> None:
    """Whatever is installed, what is left after running the advised commands has no version problem."""
    old_to_new = [None, "1.6.1", "1.7.0", "1.8.0", "1.9.0", "1.10.0"]
    fbgemms = [
        {name: version for name, version in zip(("fbgemm-gpu", "fbgemm-gpu-cpu"), pair, strict=True) if version}
        for pair in itertools.product(old_to_new, repeat=2)
    ]
    fitting = 0
    for torch, fbgemm, torchrec in itertools.product(
        [None, "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"], fbgemms, old_to_new
    ):
        before = after = Stack(torch, build if torch else "", fbgemm, torchrec)
        problem = version_problem(before)
        if problem is None:
            fitting += 1
            continue
        for command in problem.partition("Run: ")[2].split(" && "):
            after = _run_pip(after, command)
        assert version_problem(after) is None, (before, problem)
        if torch in [trio.torch for trio in TESTED]:
            assert after.torch == torch
    # Five trios fit by their numbers, with either FBGEMM under a CUDA torch and with the CPU one under a CPU torch.
    assert fitting == (5 if build == "CPU" else 10)


def test_tested_trios_are_those_with_a_lock_and_the_ranges_hold_them() -> None:
    locks = [
        dict(line.split("==") for line in path.read_text().splitlines() if not line.startswith("#"))
        for path in sorted((ROOT / "requirements").glob("trio-*.txt"))
    ]
    assert [Trio(lock["torch"], lock["fbgemm-gpu"], lock["torchrec"]) for lock in locks] == list(TESTED)
    assert all(lock["fbgemm-gpu-cpu"] == lock["fbgemm-gpu"] for lock in locks)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name in ("numpy", "torch", "torchrec"):
        assert all(lock[name] in ranges[name] for lock in locks), name
    assert all(version not in ranges["torch"] for version in ("2.10.0", "2.12.1", "2.15.0"))


def test_a_pytorch_that_does_not_load_the_operators_is_a_problem(environment: Environment) -> None:
    if not load_operators():
        pytest.skip("the operators' library was not built")
    loading = "    def load_library(path): raise OSError(path + ': undefined symbol: torch_from_blob')"
    source = f"__version__ = '2.10.0'\n{TORCH}{loading}\n"
    environment.place_stack("2.10.0", "1.5.0", "1.5.0", torch_source=source)
    assert problems_of(environment.doctor()) == [
        "the operators of served models need PyTorch 2.11 or later, and do not load beside 2.10.0: "
        f"{operators_library()}: undefined symbol: torch_from_blob"
    ]


OPERATORS = {"off": "PyTorch (TORCHREC_QR_CPU_KERNELS=off)", "auto": "the operators of"}


@pytest.mark.parametrize("setting", OPERATORS)
def test_the_operators_of_served_models_may_be_off(setting: str) -> None:
    if not load_operators():
        pytest.skip("the operators' library was not built")
    result = subprocess.run(
        [sys.executable, "-c", "from torchrec_qr.ops.serving_library import status; print(status())"],
        env={**os.environ, "TORCHREC_QR_CPU_KERNELS": setting},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout.startswith(OPERATORS[setting])
