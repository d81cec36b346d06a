"""The one list of commands of the pages that do not run here, and what is checked of them instead."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from fenced_blocks import ROOT
from warm_commands import help_of

_MINUTES = "takes minutes; tests/launch has such a job with fewer rows"
_INSTALLS = "changes the environment that runs it"
# How a command begins: why it does not run. A test fails on an entry that no page needs.
NOT_RUN = {
    "NCCL_DEBUG=INFO": "needs GPUs",
    "NCCL_SOCKET_IFNAME=": "needs several networks",
    "TORCH_FR_DUMP_TEMP_FILE=": "needs GPUs",
    "docker": "needs Docker's engine; tests/release runs the commands of the Dockerfile",
    "make train": _MINUTES,
    "make test": "takes minutes; CI runs it",
    "make wheel": "takes a minute; `make test-wheel` runs it",
    "pip install": _INSTALLS,
    "py-spy": "needs a job that hangs",
    "python -m benchmarks.quality": "takes hours; tests/quality has such a study in small",
    "python -m launch.predict": "needs a run; tests/launch has one",
    "python -m launch.train": _MINUTES,
    "python -m torch.distributed.flight_recorder": "needs the records of a job that hung",
    "scripts/slurm_cluster.sh": "needs root and daemons; `make test-slurm` runs it",
    "sudo scripts/ray_head.sh": "needs root and Ray; `make test-ray` runs it",
    "torchrun --nnodes": "needs two hosts; tests/two_hosts has them",
    "torchrun --nproc-per-node 2 -m launch.train": _MINUTES,
    "torchrun --standalone --nproc-per-node 2 -m launch.train": _MINUTES,
    "torchrun --standalone --nproc-per-node 8 -m benchmarks.step": _MINUTES,
    "torchx run -s ray": "TorchX needs Ray for a dry run; tests/ray has the job",
}
# Programs that a page may name, though this project's environment lacks them.
_ELSEWHERE = {"apt-get", "dnf", "docker", "py-spy", "sudo"}
_FOLDERS = "benchmarks|configs|docs|examples|launch|requirements|scripts|tests|torchrec_qr"
_FILE = re.compile(rf"^(?:(?:--)?\w[\w-]*=)?(?P<path>(?:{_FOLDERS})/[\w./-]+\.\w+)(?::\w+)?$")
_ASSIGNMENT = re.compile(r"^[A-Z_]+=")


def check(command: str) -> list[str]:
    """Returns what is wrong with a command that does not run: programs, targets, modules, options, files."""
    errors = []
    for words in _parts(command):
        while words and (_ASSIGNMENT.match(words[0]) or words[0] in ("sudo", "...")):
            words.pop(0)
        if words:
            errors += _errors_of_files(words) + _errors_of_program(words)
    return errors


def _parts(command: str) -> list[list[str]]:
    """Returns the words of each program that a line starts, without its comment."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _errors_of_files(words: list[str]) -> list[str]:
    paths = [match["path"] for match in map(_FILE.match, words) if match]
    return [f"{path} is not there" for path in paths if not (ROOT / path).exists()]


def _errors_of_program(words: list[str]) -> list[str]:
    program, arguments = words[0], words[1:]
    if program == "eval":
        return []
    if program == "make":
        return _errors_of_make(arguments)
    if program == "torchrun":
        return _errors_of_torchrun(arguments)
    if program == "pip":
        return _errors_of_module(program, arguments[1:], arguments[0])
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        return _errors_of_module(arguments[1], arguments[2:])
    if "/" in program:
        file = ROOT / program
        return [] if program.startswith(".venv") or os.access(file, os.X_OK) else [f"{program} is no program"]
    known = program in _ELSEWHERE or shutil.which(program) or (Path(sys.executable).parent / program).exists()
    return [] if known else [f"{program} is no program of the environment"]


def _errors_of_make(arguments: list[str]) -> list[str]:
    dry = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return [] if dry.returncode == 0 else [dry.stderr.strip()]


def _errors_of_torchrun(arguments: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    try:
        parsed = get_args_parser().parse_args(arguments)
    except SystemExit:
        return [f"torchrun refuses {arguments}"]
    if parsed.module:
        return _errors_of_module(parsed.training_script, parsed.training_script_args)
    return [] if (ROOT / parsed.training_script).exists() else [f"{parsed.training_script} is not there"]


def _errors_of_module(module: str, arguments: list[str], *subcommand: str) -> list[str]:
    if find_spec(module) is None:
        return [f"there is no module {module}"]
    options = [word.partition("=")[0] for word in arguments if word.startswith("-") and len(word) > 1]
    missing = [
        option
        for option in options
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_of(module, *subcommand))
    ]
    return [f"{module} has no option {option}" for option in missing]
