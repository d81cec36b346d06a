"""Criteo's raw click logs: Kaggle's ``train.txt`` and the 1TB set's ``day_0`` … ``day_23``, plain or gzip."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from launch.data.prefetch import mapped
from launch.data.source import Block, SequentialSource
from launch.data.text import TextFile
from launch.data.tsv_parser import parse

_PARSERS = 2  # threads: NumPy, which does the work, leaves the interpreter to others meanwhile


class TsvFile:
    """One file, as a `BlockFile`; a row is a line, whatever it holds."""

    def __init__(self, path: str | Path) -> None:
        self._text = TextFile(path)

    @property
    def num_rows(self) -> int:
        return self._text.num_lines

    def blocks(self, start: int) -> Iterator[Block]:
        # Closed by hand: a consumer that stops early leaves it suspended, a file and a thread open.
        with closing(self._text.blocks(start)) as blocks:
            yield from mapped(parse, blocks, _PARSERS)

    def location(self, row: int) -> str:
        return f"{self._text.path}:{row + 1}"


def tsv_source(paths: Sequence[str | Path]) -> SequentialSource:
    """Returns the rows of the files, one after the other.

    Raises:
        DataError: of the first file that is missing, unreadable, empty, or a truncated or corrupt gzip file.
    """
    return SequentialSource([TsvFile(path) for path in paths])
