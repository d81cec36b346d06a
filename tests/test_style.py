"""The style, as far as a test can check it: one concept a file, and a name that occurs once."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400

# Each of these breaks the rule and is to be split or renamed. No list may grow.
LONGER = {
    "benchmarks/step_variants.py",
    "launch/trainer.py",
    "tests/cuda_without_gpu/fake_cuda.py",
    "tests/distributed/test_checkpoints.py",
    "tests/test_module_behaviour.py",
    "tests/test_schema_tables.py",
}
SAME_NAME: set[str] = set()
# Python and pytest give these names their meaning.
NAMED_BY_OTHERS = {"__init__.py", "__main__.py", "conftest.py"}


@pytest.fixture(scope="module")
def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.h", "*.sh"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a checkout: no list of files")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_no_file_is_longer_than_400_lines(sources: list[Path]) -> None:
    longer = {str(p.relative_to(ROOT)) for p in sources if len(p.read_text().splitlines()) > MOST_LINES}
    assert longer - LONGER == set()
    assert LONGER - longer == set(), "these keep the rule now: take them off the list"


def test_a_file_name_occurs_once(sources: list[Path]) -> None:
    counts = Counter(p.name for p in sources)
    twice = {name for name, count in counts.items() if count > 1} - NAMED_BY_OTHERS
    assert twice - SAME_NAME == set()
    assert SAME_NAME - twice == set(), "these occur once now: take them off the list"
