"""A package index shows the Pythons that the tests have run with."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pythons() -> list[str]:
    return [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]


def test_the_oldest_python_is_the_one_that_is_required() -> None:
    assert PROJECT["requires-python"] == f">={pythons()[0]}"


def test_the_pythons_are_those_of_the_changelog() -> None:
    """An index shows the classifiers, and readers take them for what was tested."""
    assert f"(tested with {', and in part with '.join(pythons())})" in (ROOT / "CHANGELOG.md").read_text()
