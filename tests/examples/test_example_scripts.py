"""The commands of the examples' page run, and print what stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "README.md").read_text()
# The script, the command and its output of each section.
SECTIONS = re.findall(r"^## (\w+\.py)\n.*?```sh\n(.*?)\n```\n\n```text\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def printed(command: str, folder: Path) -> str:
    """Returns what a command prints that is run in a folder like a checkout."""
    (folder / "examples").symlink_to(EXAMPLES)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_as_printed(actual: str, expected: str) -> None:
    """Asserts equal text, whole numbers and spaces within lines, and decimals that differ by at most 2 in the last."""
    lines = [[line.rstrip() for line in text.strip().splitlines()] for text in (actual, expected)]
    assert [NUMBER.sub("#", line) for line in lines[0]] == [NUMBER.sub("#", line) for line in lines[1]]
    for own, given in zip(*lines, strict=True):
        for number, stated in zip(NUMBER.findall(own), NUMBER.findall(given), strict=True):
            digits = len(stated.partition(".")[2])
            difference = abs(float(number.replace(",", "")) - float(stated.replace(",", "")))
            assert difference <= (2.5 * 10**-digits if digits else 0), (own, given)


def test_every_script_has_a_section_and_fewer_than_60_lines() -> None:
    shown = [script for script, _, _ in SECTIONS]
    # ratings.py is the data of sequence.py.
    assert sorted([*shown, "ratings.py"]) == SCRIPTS
    lengths = {name: len((EXAMPLES / name).read_text().splitlines()) for name in shown}
    assert {name: lines for name, lines in lengths.items() if lines >= 60} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "command", "output"), SECTIONS, ids=[script for script, _, _ in SECTIONS])
def test_a_script_prints_what_the_page_has(script: str, command: str, output: str, tmp_path: Path) -> None:
    assert command.endswith(f"examples/{script}")
    assert_as_printed(printed(command, tmp_path), output)
