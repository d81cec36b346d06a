"""Criteo's raw click logs: Kaggle's ``train.txt`` and the 1TB set's ``day_0`` … ``day_23``, plain or gzip."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from launch.data.prefetch import mapped
from launch.data.source import Block, Labels, SequentialSource
from launch.data.text import TextFile
from launch.data.tsv_parser import NUM_COLUMNS, parse, parse_unlabelled

_PARSERS = 2  # threads: NumPy, which does the work, leaves the interpreter to others meanwhile


class TsvFile:
    """One file, as a `BlockFile`; a row is a line, whatever it holds.

    With ``labels="optional"`` a file whose first line has 39 columns, as Kaggle's ``test.txt``, has no labels.
    """

    def __init__(self, path: str | Path, labels: Labels = "needed") -> None:
        self._text = TextFile(path)
        self._parse = parse
        if labels == "optional":
            with closing(self._text.blocks(0)) as blocks:
                if next(blocks).partition(b"\n")[0].count(b"\t") + 1 == NUM_COLUMNS - 1:
                    self._parse = parse_unlabelled

    @property
    def num_rows(self) -> int:
        return self._text.num_lines

    def blocks(self, start: int) -> Iterator[Block]:
        # Closed by hand: a consumer that stops early leaves it suspended, a file and a thread open.
        with closing(self._text.blocks(start)) as blocks:
            yield from mapped(self._parse, blocks, _PARSERS)

    def location(self, row: int) -> str:
        return f"{self._text.path}:{row + 1}"


def tsv_source(paths: Sequence[str | Path], labels: Labels = "needed") -> SequentialSource:
    """Returns the rows of the files, one after the other.

    Raises:
        DataError: of the first file that is missing, unreadable, empty, or a truncated or corrupt gzip file.
    """
    return SequentialSource([TsvFile(path, labels) for path in paths])
