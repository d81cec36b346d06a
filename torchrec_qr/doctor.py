"""``torchrec-qr doctor``: do the installed torch, FBGEMM and TorchRec fit, and if not, what is to be installed?

The three are built for one another: a mismatch shows as an undefined symbol deep in an import, and pip does not prevent
it. Versions are read from metadata, and imports tried in a process of their own, since either may crash.
"""

import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from torchrec_qr.ops.triton_compiler import c_compiler, what_is_missing

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
# What TorchRec needs besides, which `pip install --no-deps torchrec` leaves out; the name to install by module.
TORCHREC_NEEDS = {
    "iopath": "iopath",
    "pyre_extensions": "pyre-extensions",
    "tensordict": "tensordict",
    "torchmetrics": "torchmetrics==1.0.3",
    "tqdm": "tqdm",
}
_MODULE_OF = {"torch": "torch", "fbgemm": "fbgemm_gpu", "torchrec": "torchrec"}
_IMPORT_SECONDS = 300

# Announces each module before its import, so that the last one announced is the one that crashed. FBGEMM swallows some
# failures to load its libraries, so one of its operators is looked up too.
_PROBE = """
import json, os, sys
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for module in sys.argv[1:]:
    print(json.dumps({"importing": module}), file=out)
    try:
        imported = __import__(module)
        if module == "fbgemm_gpu":
            import torch
            torch.ops.fbgemm.asynchronous_complete_cumsum
    except BaseException as error:
        failure = {"type": type(error).__name__, "message": str(error), "missing": getattr(error, "name", None)}
        print(json.dumps({"failed": module, **failure}), file=out)
        break
    print(json.dumps({"imported": module}), file=out)
"""


@dataclass(frozen=True)
class Trio:
    """Versions of torch, FBGEMM and TorchRec that were seen working together."""

    torch: str
    fbgemm: str
    torchrec: str


# The versions of requirements/trio-*.txt, old to new.
TESTED = (Trio("2.11.0", "1.6.0", "1.6.1"), Trio("2.13.0", "1.8.0", "1.8.0"), Trio("2.14.1", "1.9.0", "1.9.2"))


@dataclass(frozen=True)
class Stack:
    """What is installed, by metadata; None: not installed. ``fbgemm`` maps each FBGEMM distribution to its version.

    Example:
        >>> from torchrec_qr.doctor import Stack
        >>> Stack(torch="2.13.0", torch_build="CPU", fbgemm={}, torchrec=None).fbgemm_name
        'fbgemm-gpu-cpu'
    """

    torch: str | None
    torch_build: str
    fbgemm: dict[str, str]
    torchrec: str | None

    @classmethod
    def installed(cls) -> "Stack":
        """Reads the metadata of the running interpreter's environment."""
        return cls(
            torch=_version("torch"),
            torch_build=_torch_build(),
            fbgemm={name: version for name in FBGEMM if (version := _version(name))},
            torchrec=_version("torchrec"),
        )

    @property
    def fbgemm_name(self) -> str:
        """The FBGEMM distribution that belongs here: the one installed, unless it cannot be right."""
        if len(self.fbgemm) == 1 and not (self.torch_build == "CPU" and "fbgemm-gpu" in self.fbgemm):
            return next(iter(self.fbgemm))
        return "fbgemm-gpu" if self.torch_build != "CPU" and shutil.which("nvidia-smi") else "fbgemm-gpu-cpu"


@dataclass(frozen=True)
class ImportFailure:
    """Why a module could not be imported: the exception, or the way in which its process died."""

    module: str
    type: str
    message: str
    missing: str | None = None


def run() -> int:
    """Prints versions, then verdict and advice; returns 0 if the stack fits and imports, else 1.

    Example:
        >>> from torchrec_qr import doctor
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
    on_gpu = lookup_on_gpu() if for_gpu or gpu else None
    if for_gpu and gpu and what_is_missing():
        problem = problem or on_gpu
    if problem:
        print(f"PROBLEM: {problem}")
        return 1
    how = "tested" if is_tested(stack) else "by their numbers; this trio is not tested"
    print(f"OK: {_described(stack)} fit together ({how}).")
    if on_gpu:
        print(f"Lookups on a GPU: {on_gpu}.")
    print(f"Lookups on a CPU: {lookup_on_cpu()}.")
    return 0


def lookup_on_gpu() -> str:
    """Returns what looks tables up on a GPU, or what that lacks on this machine.

    Example:
        >>> from torchrec_qr import doctor
        >>> doctor.lookup_on_gpu()  # doctest: +SKIP
        "Triton's kernels, whose driver is compiled by /usr/bin/gcc"
    """
    if missing := what_is_missing():
        return f"Triton compiles its driver at the first lookup on a GPU, and lacks {missing}"
    return f"Triton's kernels, whose driver is compiled by {c_compiler()}"


def lookup_on_cpu() -> str:
    """Returns what looks tables up on a CPU: the kernels and their instruction set, or PyTorch and why.

    Asked of a process of its own, after the import of torch, as in use: the library takes torch's OpenMP.

    Example:
        >>> from torchrec_qr import doctor
        >>> doctor.lookup_on_cpu()  # doctest: +SKIP
        'kernels (avx512)'
    """
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; from torchrec_qr.ops import cpu_library; print(cpu_library.status())"],
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
        check=False,
    )
    lines = asked.stdout.splitlines()
    if asked.returncode or not lines:
        return f"PyTorch: loading the kernels ended with {_death(asked.returncode)}"
    return lines[-1]


def version_problem(stack: Stack) -> str | None:
    """Returns what is wrong with the installed versions, and the command that mends it; None: they fit.

    FBGEMM 1.a and TorchRec 1.b fit if a = b, and PyTorch 2.m fits them if m = a + 5, as their release tables have it.

    Example:
        >>> from torchrec_qr.doctor import Stack, version_problem
        >>> version_problem(Stack("2.13.0", "CUDA 13.0", {"fbgemm-gpu": "1.8.0"}, "1.8.0"))
        >>> print(version_problem(Stack("2.13.0", "CUDA 13.0", {"fbgemm-gpu": "1.9.0"}, "1.8.0")))
        torch 2.13.0, fbgemm-gpu 1.9.0 and torchrec 1.8.0 do not fit together. Run: pip install fbgemm-gpu==1.8.0
    """
    misplaced = len(stack.fbgemm) > 1 or (stack.torch_build == "CPU" and "fbgemm-gpu" in stack.fbgemm)
    cure = _mend(replace(stack, fbgemm={}) if misplaced else stack)
    if misplaced:
        # Both distributions own the same files, so what is left after removing one is in pieces: remove all there is.
        cure = f"pip uninstall -y {' '.join(stack.fbgemm)} && {cure}"

    parts = {"torch": stack.torch, stack.fbgemm_name: stack.fbgemm, "torchrec": stack.torchrec}
    absent = [name for name, there in parts.items() if not there]
    if absent:
        problem = f"{_joined(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    elif len(stack.fbgemm) > 1:
        both = _joined([f"{name} {version}" for name, version in stack.fbgemm.items()])
        problem = f"{both} are both installed, and overwrite each other's files"
    elif misplaced:
        problem = f"fbgemm-gpu {stack.fbgemm['fbgemm-gpu']} is built for CUDA, and torch {stack.torch} without"
    elif not _fits(stack):
        problem = f"{_described(stack)} do not fit together"
    else:
        return None
    return f"{problem}. Run: {cure}"


def is_tested(stack: Stack) -> bool:
    """Whether the three minor versions are those of a trio in ``TESTED``.

    Example:
        >>> from torchrec_qr.doctor import Stack, is_tested
        >>> is_tested(Stack("2.14.0", "CUDA 13.0", {"fbgemm-gpu": "1.9.0"}, "1.9.2"))
        True
        >>> is_tested(Stack("2.15.0", "CUDA 13.0", {"fbgemm-gpu": "1.10.0"}, "1.10.0"))
        False
    """
    minors = _minors(stack)
    return any(minors == tuple(map(_minor, (trio.torch, trio.fbgemm, trio.torchrec))) for trio in TESTED)


def try_imports() -> tuple[list[str], ImportFailure | None]:
    """Imports torch, FBGEMM and TorchRec in a new process; returns those that worked and the first that did not.

    Example:
        >>> from torchrec_qr.doctor import try_imports
        >>> try_imports()
        (['torch', 'fbgemm_gpu', 'torchrec'], None)
    """
    command = [sys.executable, "-P", "-c", _PROBE, *_MODULE_OF.values()]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
        stdout, death = process.stdout, _death(process.returncode)
    except subprocess.TimeoutExpired as timeout:
        stdout, death = (timeout.stdout or b"").decode(), f"no end after {_IMPORT_SECONDS} seconds"
    imported: list[str] = []
    current = ""
    for line in stdout.splitlines():
        event = json.loads(line)
        if "failed" in event:
            return imported, ImportFailure(event["failed"], event["type"], event["message"], event["missing"])
        if "imported" in event:
            imported.append(event["imported"])
        current = event.get("importing", "")
    if len(imported) < len(_MODULE_OF):
        return imported, ImportFailure(current, "crash", death)
    return imported, None


def explain(failure: ImportFailure, stack: Stack) -> str:
    """Returns a sentence on why an import failed though the versions fit, and the command that mends it.

    Example:
        >>> from torchrec_qr.doctor import ImportFailure, Stack, explain
        >>> stack = Stack("2.13.0+cpu", "CPU", {"fbgemm-gpu-cpu": "1.8.0"}, "1.8.0")
        >>> print(explain(ImportFailure("torchrec", "ModuleNotFoundError", "No module named 'tqdm'", "tqdm"), stack))
        torchrec needs the module tqdm, which is not installed. Run: pip install tqdm
    """
    module, message = failure.module, failure.message
    first_line = next((line for line in message.splitlines() if line.strip()), failure.type).strip()
    again = _mend(stack, reinstall=("torch",) if module == "torch" else ("fbgemm", "torchrec"))
    if failure.type == "ModuleNotFoundError":
        missing = (failure.missing or first_line).split(".")[0]
        if missing in _MODULE_OF.values():
            return f"{missing} is listed as installed, but its files are not there. Run: {again}"
        package = TORCHREC_NEEDS.get(missing, missing.replace("_", "-"))
        return f"{module} needs the module {missing}, which is not installed. Run: pip install {package}"
    if "undefined symbol" in message:
        return f"{module} was built for another build of PyTorch than torch {stack.torch} ({first_line}). Run: {again}"
    if library := re.search(r"(\S+\.so[.\d]*): cannot open shared object file", message):
        name = library[1]
        if re.match(r"lib(cu|nv|nccl)", name) and "fbgemm-gpu" in stack.fbgemm and module == "fbgemm_gpu":
            return (
                f"fbgemm-gpu needs CUDA's {name}, which is not on this machine. For a machine without a GPU run: "
                f"pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu=={stack.fbgemm['fbgemm-gpu']}"
            )
        if re.match(r"lib(torch|c10|fbgemm)", name):
            return f"{module} lacks {name}, a part of the stack itself. Run: {again}"
        return (
            f"{module} needs the shared library {name}, which is not on this machine: install the system package that "
            f"has it (libgomp.so.1: apt-get install libgomp1)."
        )
    if failure.type == "crash":
        return f"importing {module} killed Python ({message}), as libraries of different builds do. Run: {again}"
    if module == "fbgemm_gpu" and failure.type == "AttributeError":
        return f"fbgemm_gpu imports, but its operators did not load ({first_line}). Run: {again}"
    return f"importing {module} raised {failure.type}: {first_line}. To install it anew, run: {again}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _fbgemm(stack: Stack) -> str | None:
    return stack.fbgemm.get(stack.fbgemm_name) or next(iter(stack.fbgemm.values()), None)


def _minors(stack: Stack) -> tuple[tuple[int, int], ...]:
    return tuple(_minor(version or "") for version in (stack.torch, _fbgemm(stack), stack.torchrec))


def _fits(stack: Stack) -> bool:
    torch, fbgemm, torchrec = _minors(stack)
    return fbgemm == torchrec and torch == (fbgemm[0] + 1, fbgemm[1] + 5)


def _goal(stack: Stack) -> Trio:
    """The trio that changes least: it keeps torch where it can, else FBGEMM; else it is the newest that was tested."""
    torch, fbgemm, torchrec = _minors(stack)
    fitting = (torch[0] - 1, torch[1] - 5)
    if stack.torch and fitting in (fbgemm, torchrec):
        known = next((trio for trio in TESTED if _minor(trio.torch) == torch), None)
        return known or Trio(stack.torch, *["{}.{}.*".format(*fitting)] * 2)
    for index, part in enumerate((torch, fbgemm)):
        for trio in TESTED:
            if _minor((trio.torch, trio.fbgemm)[index]) == part:
                return trio
    return TESTED[-1]


def _mend(stack: Stack, reinstall: tuple[str, ...] = ()) -> str:
    """The pip commands that make the stack fit, changing only what must change, and putting ``reinstall`` in anew."""
    goal, name = _goal(stack), stack.fbgemm_name
    wanted = {}
    for part, distribution, installed, version in (
        ("torch", "torch", stack.torch, goal.torch),
        ("fbgemm", name, _fbgemm(stack), goal.fbgemm),
        ("torchrec", "torchrec", stack.torchrec, goal.torchrec),
    ):
        if installed is None or _minor(installed) != _minor(version):
            wanted[part] = f"{distribution}=={version}"
        elif part in reinstall:
            wanted[part] = f"{distribution}=={installed.split('+')[0]}"
    # With what it requires, torchrec would bring fbgemm-gpu along; beside fbgemm-gpu-cpu it goes in alone.
    alone = wanted.pop("torchrec", None) if name == "fbgemm-gpu-cpu" else None
    force = "--force-reinstall " if reinstall else ""
    # torch brings libraries of its own along, that may be what is missing.
    force += "--no-deps " if reinstall and "torch" not in wanted else ""
    commands = [f"pip install {force}{shlex.join(wanted.values())}"] if wanted else []
    if alone:
        commands.append(f"pip install {'--force-reinstall ' if reinstall else ''}--no-deps {shlex.join([alone])}")
        if stack.torchrec is None:
            commands.append(f"pip install {shlex.join(TORCHREC_NEEDS.values())}")
    return " && ".join(commands)


def _death(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def _joined(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _described(stack: Stack) -> str:
    fbgemm = [f"{name} {version}" for name, version in stack.fbgemm.items()]
    return _joined([f"torch {stack.torch}", *fbgemm, f"torchrec {stack.torchrec}"])


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
        ("triton", _version("triton"), "", ""),
        ("torchx", _version("torchx"), "", ""),
    ]
    cells = [[cell or ("-" if column == 1 else "") for column, cell in enumerate(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _torch_build() -> str:
    """``"CPU"``, ``"CUDA 13.0"`` or ``"ROCm 6.4"``, as torch's own version file has it; "" where there is none."""
    try:
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
    except (metadata.PackageNotFoundError, OSError):
        return "CPU" if (_version("torch") or "").endswith("+cpu") else ""
    for field, name in (("cuda", "CUDA"), ("hip", "ROCm")):
        if found := re.search(rf"^{field}\b.*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE):
            return f"{name} {found[1]}"
    return "CPU"
