"""The shell blocks of a page: bash runs them in a copy of the checkout, and what cannot run here is checked instead."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from commands_not_run import NOT_RUN, check
from fenced_blocks import ROOT, Block
from warm_commands import is_warm, run_warm

# The checkout's entries that a command may read. A run's folder, a build and a cache are the page's own.
_NOT_COPIED = {"build", "dist", "runs", ".git"}
# TorchX's commands stop before they submit a job.
_PRELUDE = """\
set -euo pipefail
torchx() {
    if [ "$1" = run ]; then command torchx --log_level ERROR run --dryrun "${@:2}"; else command torchx "$@"; fi
}
"""
_SECONDS = 240
# The rank that a page's process is, which its commands are not.
_OF_A_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


@dataclass
class Command:
    """A command of a block, from its first line to the last of those that a backslash joins."""

    line: int
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(line.removesuffix("\\").strip() for line in self.lines)


def commands_of(block: Block) -> list[Command]:
    """Returns the commands of a block, in order, without comments of their own and blank lines."""
    commands: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if not goes_on and (not line.strip() or line.lstrip().startswith("#")):
            continue
        if not goes_on:
            commands.append(Command(number))
        commands[-1].lines.append(line)
        goes_on = line.endswith("\\")
    return commands


def reason_not_to_run(command: str) -> str | None:
    """Returns the reason of the list for which a command does not run, or None."""
    return next((reason for beginning, reason in NOT_RUN.items() if command.startswith(beginning)), None)


def make_checkout(folder: Path) -> None:
    """Makes links to the checkout's entries in a folder; ``configs`` is a folder of links, to which a page may add."""
    for entry in ROOT.iterdir():
        if entry.name == "configs":
            (folder / "configs").mkdir()
            for config in entry.iterdir():
                (folder / "configs" / config.name).symlink_to(config)
        elif entry.name not in _NOT_COPIED:
            (folder / entry.name).symlink_to(entry)


def run_block(block: Block, folder: Path, setup: str = "") -> str:
    """Runs a block's commands in one bash, after ``setup``, and checks those that cannot run; returns what was printed.

    Raises:
        AssertionError: the exit code is not 0, or a command that does not run is wrong; with the line.
    """
    commands = []
    for command in commands_of(block):
        if reason_not_to_run(command.text) is None:
            commands.append(command)
        else:
            errors = check(command.text)
            assert not errors, f"line {command.line}: {command.text}: {'; '.join(errors)}"
    if not setup and all(is_warm(command.text) for command in commands):
        printed = []
        for command in commands:
            code, output = run_warm(command.text)
            assert code == 0, f"line {command.line}: exit code {code} of {command.text}\n{output[-4000:]}"
            printed.append(output)
        return "".join(printed)
    return _run_by_bash(block, [line for command in commands for line in command.lines], folder, setup)


def _run_by_bash(block: Block, script: list[str], folder: Path, setup: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        ["bash", "-c", "\n".join([_PRELUDE + setup, *script])],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    shown = re.sub(r"\n{3,}", "\n\n", result.stdout[-4000:])
    assert result.returncode == 0, f"line {block.line}: exit code {result.returncode} of\n{block.text}\n{shown}"
    return result.stdout
