"""Runs the commands of a page as its reader would, jobs included, and compares what they print with the page."""

import io
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from fenced_blocks import Block
from shell_blocks import Command, commands_of, run_block

from tests.launch.jobs import start_ranks

_TRAIN = re.compile(r"(torchrun --standalone --nproc-per-node (?P<ranks>\d+)|python) -m launch\.train ")
_DECIMAL = re.compile(r"\d[\d,]*\.\d+")


class Session:
    """The commands of a page, one after the other, in a folder that is the working directory.

    Jobs run on ranks that are forked, and other programs of the project in this process, because each start of Python
    would import PyTorch anew.

    Args:
        folder (Path): like a checkout.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._names = folder, dict[str, Any]()

    def run(self, block: Block) -> str:
        """Runs a block of Python or of a shell; returns what it printed."""
        if block.language == "python":
            return _caught(lambda: exec(compile(block.text, f"line {block.line}", "exec"), self._names))
        return "".join(self._run(command) for command in commands_of(block))

    def _run(self, command: Command) -> str:
        words = shlex.split(command.text)
        if job := _TRAIN.match(command.text):
            return self._trained(words[words.index("launch.train") + 1 :], int(job["ranks"] or 1))
        if words[:3] == ["python", "-m", "launch.predict"]:
            from launch.predict import main as predict

            return _caught(partial(predict, words[3:]))
        return run_block(Block("sh", command.line, command.text + "\n"), self._folder)

    def _trained(self, arguments: Sequence[str], world_size: int) -> str:
        ranks = start_ranks(partial(_train, arguments), self._folder / "printed", world_size)
        codes, text = ranks.exit_codes(), ranks.text()
        assert codes == [int("Error: " in text)] * world_size, text
        return text


def _train(arguments: Sequence[str]) -> None:
    from launch.train import main

    main(list(arguments))


def _caught(call: Callable[[], object]) -> str:
    with redirect_stdout(io.StringIO()) as text, redirect_stderr(text):
        call()
    return text.getvalue()


def assert_printed(shown: str, printed: str) -> None:
    """Asserts that the lines of ``shown`` were printed, in their order; dots stand for anything.

    Spaces within lines may differ, and decimals by 2 in their last digit, because processors round differently.

    Raises:
        AssertionError: a line was not printed.
    """
    left = [" ".join(line.split()) for line in printed.splitlines()]
    for line in shown.splitlines():
        if line.strip() == "...":
            continue
        wanted = " ".join(line.split())
        place = next((i for i, own in enumerate(left) if _agree(wanted, own)), None)
        assert place is not None, f"{wanted!r} was not printed in\n{printed}"
        left = left[place + 1 :]


def _agree(shown: str, printed: str) -> bool:
    parts = [re.escape(part) for part in re.split(r"\d[\d,]*\.\d+|\.\.\.", shown)]
    holes = re.findall(r"\d[\d,]*\.\d+|\.\.\.", shown)
    pattern = parts[0]
    for hole, part in zip(holes, parts[1:], strict=True):
        pattern += (".*?" if hole == "..." else r"(\d[\d,]*\.\d+)") + part
    match = re.fullmatch(pattern, printed)
    if match is None:
        return False
    decimals = [hole for hole in holes if hole != "..."]
    return all(_near(stated, own) for stated, own in zip(decimals, match.groups(), strict=True))


def _near(stated: str, own: str) -> bool:
    digits = len(stated.partition(".")[2])
    return abs(float(stated.replace(",", "")) - float(own.replace(",", ""))) <= 2.5 * 10**-digits
