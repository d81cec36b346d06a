"""The style, as far as a test can check it: one concept a file, a name that occurs once, and the glossary's words."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 400

# Each of these breaks the rule and is to be split or renamed. No list may grow.
LONGER: set[str] = set()
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


def banned_words() -> list[str]:
    """Returns the words in backticks in the first column of the glossary's table."""
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    section = glossary.split("\n## Not these words\n")[1].split("\n## ")[0]
    return [word for row in re.findall(r"^\|([^|]+)\|", section, re.MULTILINE) for word in re.findall(r"`(.+?)`", row)]


def as_words(text: str) -> str:
    """Returns lower-case words, with those of a name in snake case or camel case apart."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text).lower()


def words_found(text: str, words: list[str]) -> set[str]:
    return {word for word in words if re.search(rf"\b{word}\b", as_words(text))}


def test_banned_words_are_found_in_names_and_prose() -> None:
    assert {"exchange", "placed", "says something"} <= set(banned_words())
    text = "def exchange_ms(self): ...\nclass PlacedModel: ...\n# if it says_something\nreplaced = misplaced"
    assert words_found(text, banned_words()) == {"exchange", "placed", "says something"}


def test_no_name_or_prose_has_a_word_that_the_glossary_bans(sources: list[Path]) -> None:
    words, found = banned_words(), set()
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("torchrec_qr/", "launch/", "benchmarks/")):
            found |= {(name, word) for word in words_found(f"{name}\n{path.read_text()}", words)}
    assert found == set()
