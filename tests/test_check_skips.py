"""CI's check of skipped tests, run on reports that pytest itself writes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "check_skips.py"
TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.xfail(reason="known")
def test_fails(): assert False

@pytest.mark.skip(reason="no GPU")
def test_skips(): pass

class TestClass:
    @pytest.mark.parametrize("n", [1, 2])
    def test_skips(self, n): pytest.skip("no cluster")
"""
SLOW = """
import pytest

@pytest.mark.slow
@pytest.mark.skip()
def test_long(): pass
"""
ALL = "tests/test_a.py::test_skips | no GPU here\n# a comment\n\ntests/test_a.py::TestClass | no cluster here\n"


def check(directory: Path, tests: str, listed: str) -> tuple[int, list[str]]:
    """Runs pytest on ``tests``, and the check on its report; returns the check's exit code and lines."""
    (directory / "tests").mkdir()
    (directory / "tests" / "test_a.py").write_text(tests)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (directory / "list.txt").write_text(listed)
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    reports = {"quick.xml": "not slow", "slow.xml": "slow"} if "slow" in tests else {"all.xml": ""}
    for report, chosen in reports.items():
        subprocess.run(
            [*pytest_command, f"--junit-xml={report}", "-m", chosen], cwd=directory, capture_output=True, check=False
        )
    command = [sys.executable, SCRIPT, "list.txt", *reports]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return result.returncode, (result.stdout + result.stderr).splitlines()


@pytest.mark.parametrize(
    ("tests", "listed", "code", "lines"),
    [
        (TESTS, ALL, 0, ["skips as expected: 3 of 5 tests"]),
        (
            TESTS,
            "tests/test_a.py::TestClass::test_skips[1] | no cluster\ntests/test_a.py::test_skips | no GPU\n",
            1,
            ["skipped, and not in list.txt: tests/test_a.py::TestClass::test_skips[2] (no cluster)"],
        ),
        (TESTS, ALL + "?tests/test_a.py::test_runs | needs a file\n", 0, ["skips as expected: 3 of 5 tests"]),
        (
            TESTS,
            ALL + "tests/test_b.py | gone\n",
            1,
            ["in list.txt, but no such test skipped: tests/test_b.py"],
        ),
        (
            "import pytest\npytest.skip('no CUDA', allow_module_level=True)",
            "",
            1,
            [
                "skipped, and not in list.txt: tests/test_a.py (collection skipped)",
                "no test ran: all.xml has 1, 1 skipped",
            ],
        ),
        ("", "", 1, ["no test ran: all.xml has 0, 0 skipped"]),
        (SLOW.replace("skip()", "slow"), "", 1, ["no test ran: quick.xml has 0, 0 skipped"]),
        (TESTS + SLOW, ALL + "tests/test_a.py::test_long | no GPU\n", 1, ["no test ran: slow.xml has 1, 1 skipped"]),
        (
            TESTS,
            "tests/test_a.py::test_skips\n",
            1,
            ["list.txt:1: expected 'node id | reason', got 'tests/test_a.py::test_skips'"],
        ),
    ],
    ids=[
        "as-expected",
        "unlisted",
        "on-some-machines",
        "listed-in-vain",
        "whole-module",
        "no-tests",
        "no-quick-tests",
        "no-slow-tests",
        "no-reason",
    ],
)
def test_check_skips(tmp_path: Path, tests: str, listed: str, code: int, lines: list[str]) -> None:
    assert check(tmp_path, tests, listed) == (code, lines)
