"""Rows of files: any range of them is read from one or more blocks."""

import bisect
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import accumulate
from typing import Protocol

from launch.data.errors import BadRows, DataError
from launch.data.rows import Rows, concat

# Rows, and the problems of malformed ones by position. Keep a malformed row, with weight 0, because a rank finds its
# rows by their numbers.
Block = tuple[Rows, dict[int, str]]


class BlockFile(Protocol):
    """Rows in a fixed order that are read from some row on: those of a file, or generated ones."""

    @property
    def name(self) -> str: ...

    @property
    def num_rows(self) -> int:
        """Number of rows, malformed ones included."""
        ...

    def blocks(self, start: int) -> Generator[Block, None, None]:
        """Yields the rows from ``start`` on, in blocks of any size."""
        ...

    def location(self, row: int) -> str:
        """Returns ``file:line`` of a row."""
        ...

    def quoted(self, row: int, feature: int) -> str:
        """Returns the ids of a feature as they stand in the file; may be slow."""
        ...


class RowSource:
    """The rows of files, one file after the other, each read in blocks: cheap to read on from the last position.

    Two threads must not read it at once: each takes one from `reopened`.

    Args:
        files (Sequence[BlockFile]): of which those without rows are left out.
        random_access (bool): whether any range is as cheap to read as the next one.

    Attributes:
        empty (list[str]): names of the files that have no rows.
        num_rows (int): of all files.

    Raises:
        DataError: no file has any row.
    """

    def __init__(self, files: Sequence[BlockFile], random_access: bool = False) -> None:
        self.random_access = random_access
        self.empty = [file.name for file in files if file.num_rows == 0]
        self.files = [file for file in files if file.num_rows]
        if not self.files:
            raise DataError(self.empty[0], "empty" if len(files) == 1 else f"empty, and so are all {len(files)} files")
        self._ends = list(accumulate(file.num_rows for file in self.files))
        self.num_rows = self._ends[-1]
        self._position = 0
        self._blocks: Generator[Block, None, None] | None = None
        self._rest: Block | None = None

    def read(self, start: int, stop: int, bad_rows: BadRows) -> Rows:
        """Returns rows [start, stop), reporting the malformed ones.

        Raises:
            DataError: the file cannot be read, or ``bad_rows`` refuses a row.
        """
        if self._blocks is None or start != self._position:
            self.close()
            self._blocks = _blocks_from(self.files, start)
        self._position = -1  # unknown, if this fails
        parts: list[Rows] = []
        row = start
        while row < stop:
            rows, problems = self._rest or next(self._blocks)
            used = min(len(rows), stop - row)
            for i in sorted(problems):
                if i < used:
                    bad_rows.report(self.location(row + i), problems[i])
            parts.append(rows if used == len(rows) else rows.cut(0, used))
            self._rest = None
            if used < len(rows):
                self._rest = rows.cut(used, len(rows)), {i - used: p for i, p in problems.items() if i >= used}
            row += used
        self._position = stop
        return concat(parts)

    def location(self, row: int) -> str:
        """Returns ``file:line`` of a row."""
        file, row = self._place(row)
        return file.location(row)

    def quoted(self, row: int, feature: int) -> str:
        """Returns the ids of a feature as they stand in the file; may be slow."""
        file, row = self._place(row)
        return file.quoted(row, feature)

    def close(self) -> None:
        """Closes the files that `read` has left open."""
        if self._blocks is not None:
            self._blocks.close()
        self._blocks = self._rest = None

    def reopened(self) -> "RowSource":
        """Returns the same rows with a read position of its own."""
        return RowSource(self.files, self.random_access)

    def _place(self, row: int) -> tuple[BlockFile, int]:
        """Returns the file of a row, and its number in it."""
        i = bisect.bisect_right(self._ends, row)
        return self.files[i], row - (self._ends[i - 1] if i else 0)


def _blocks_from(files: Sequence[BlockFile], start: int) -> Generator[Block, None, None]:
    """Yields the rows from ``start`` on. It does not hold its source, so that one that is abandoned ends at once."""
    first = 0
    for file in files:
        end = first + file.num_rows
        if start < end:
            row = max(start, first)
            with closing(file.blocks(row - first)) as blocks:
                for block in blocks:
                    row += len(block[0])
                    if row <= end:
                        yield block
            if row != end:
                raise DataError(file.name, f"it no longer has the {file.num_rows:,} rows of when it was opened")
        first = end
