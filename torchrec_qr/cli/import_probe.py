"""Imports of torch, FBGEMM and TorchRec in a process of their own, since any may crash, and why one failed."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

from torchrec_qr.cli.installed_stack import Stack
from torchrec_qr.cli.stack_advice import TORCHREC_NEEDS, mend

MOST_SECONDS = 300
_MODULES = ("torch", "fbgemm_gpu", "torchrec")

# It announces each module before its import, so that the last one announced is the one that crashed. It also looks up
# an operator of FBGEMM, because FBGEMM swallows some failures to load its libraries.
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
    except BaseException as raised:
        # Take the loader's error, because PyTorch 2.14 puts one with the path alone before it.
        error = raised.__cause__ if isinstance(raised.__cause__, OSError) else raised
        failure = {"type": type(error).__name__, "message": str(error), "missing": getattr(error, "name", None)}
        print(json.dumps({"failed": module, **failure}), file=out)
        break
    print(json.dumps({"imported": module}), file=out)
"""


@dataclass(frozen=True)
class ImportFailure:
    """Why a module could not be imported: the exception, or the way in which its process died."""

    module: str
    type: str
    message: str
    missing: str | None = None


def try_imports() -> tuple[list[str], ImportFailure | None]:
    """Imports torch, FBGEMM and TorchRec in a new process; returns those that worked and the first that did not.

    Example:
        >>> try_imports()
        (['torch', 'fbgemm_gpu', 'torchrec'], None)
    """
    command = [sys.executable, "-P", "-c", _PROBE, *_MODULES]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
        stdout, end = process.stdout, way_of_ending(process.returncode)
    except subprocess.TimeoutExpired as timeout:
        stdout, end = (timeout.stdout or b"").decode(), f"no end after {MOST_SECONDS} seconds"
    imported: list[str] = []
    current = ""
    for line in stdout.splitlines():
        event = json.loads(line)
        if "failed" in event:
            return imported, ImportFailure(event["failed"], event["type"], event["message"], event["missing"])
        if "imported" in event:
            imported.append(event["imported"])
        current = event.get("importing", "")
    if len(imported) < len(_MODULES):
        return imported, ImportFailure(current, "crash", end)
    return imported, None


def explain(failure: ImportFailure, stack: Stack) -> str:
    """Returns a sentence on why an import failed though the versions fit, and the command that mends it.

    Example:
        >>> from torchrec_qr.cli.installed_stack import Stack
        >>> stack = Stack("2.13.0+cpu", "CPU", {"fbgemm-gpu-cpu": "1.8.0"}, "1.8.0")
        >>> print(explain(ImportFailure("torchrec", "ModuleNotFoundError", "No module named 'tqdm'", "tqdm"), stack))
        torchrec needs the module tqdm, which is not installed. Run: pip install tqdm
    """
    module, message = failure.module, failure.message
    first_line = next((line for line in message.splitlines() if line.strip()), failure.type).strip()
    again = mend(stack, reinstall=("torch",) if module == "torch" else ("fbgemm", "torchrec"))
    if failure.type == "ModuleNotFoundError":
        missing = (failure.missing or first_line).split(".")[0]
        if missing in _MODULES:
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


def way_of_ending(returncode: int) -> str:
    """Returns the signal that ended a process, or its exit code, in words.

    Example:
        >>> way_of_ending(-11), way_of_ending(3)
        ('SIGSEGV', 'exit code 3')
    """
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
