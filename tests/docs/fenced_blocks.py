"""The fenced blocks of a Markdown page, and the kinds of them that a page may have."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# A block before which this comment stands runs on rank 0 alone, on a page of several ranks.
ONE_RANK = "<!-- A test runs this on one rank. -->"
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`]*)$")
# `text` is for output, and for what no machine reads. README has the diff, of which both sides run.
_LANGUAGES = {"python", "diff", "yaml", "sh", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of the page on which its text begins, from 1, and its text."""

    language: str
    line: int
    text: str
    on_one_rank: bool = False


def pages() -> dict[str, Path]:
    """Returns the pages whose blocks are run, by name: ``docs/*.md``, and the README as ``readme``."""
    return {**{path.stem: path for path in sorted(DOCS.glob("*.md"))}, "readme": ROOT / "README.md"}


def blocks_of(page: str, *, any_language: bool = False) -> list[Block]:
    """Returns the blocks of a page's text, without those of Sphinx's directives.

    Raises:
        ValueError: a fence without an end, or a language that no test runs, with its line.
    """
    blocks, lines, start = [], page.splitlines(), 0
    while start < len(lines):
        opening = _FENCE.match(lines[start])
        if opening is None:
            start += 1
            continue
        end = _end_of(lines, start, opening["fence"])
        language = opening["info"].strip()
        if not language.startswith("{"):
            if language not in _LANGUAGES and not any_language:
                raise ValueError(f"line {start + 1}: a block of {language!r}; allowed: {', '.join(sorted(_LANGUAGES))}")
            indent = len(opening["indent"])
            text = "".join(f"{line[indent:]}\n" for line in lines[start + 1 : end])
            before = next((line.strip() for line in reversed(lines[:start]) if line.strip()), "")
            blocks.append(Block(language, start + 2, text, on_one_rank=before == ONE_RANK))
        start = end + 1
    return blocks


def _end_of(lines: list[str], start: int, fence: str) -> int:
    for end in range(start + 1, len(lines)):
        if lines[end].strip() == fence:
            return end
    raise ValueError(f"line {start + 1}: the block has no end")
