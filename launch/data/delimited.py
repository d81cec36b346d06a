"""Rows as lines of text: columns between delimiters, plain or gzip, read by Arrow's CSV reader."""

import csv
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv as csv_reader

from launch.data.columns import ColumnReader, Columns, quoted
from launch.data.errors import DataError, OnBadRow
from launch.data.prefetch import mapped
from launch.data.rows import Array
from launch.data.source import Block, Labels, SequentialSource
from launch.data.text import TextFile, lines_cut

_PARSERS = 2  # threads: Arrow, which does the work, leaves the interpreter to others meanwhile
_MISLED = "a line with a carriage return or an open quote"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Dialect:
    """How lines are cut into columns.

    Args:
        delimiter (str): one character.
        quoted (bool): a value may stand in double quotes, which are doubled within it. A line never ends within them.
        nulls (tuple[str, ...]): texts that stand for a missing value.
        names (tuple[str, ...] | None): of the columns; None: the first line of each file has them. A file that has one
            column less, if labels are optional, lacks that of the label.
    """

    delimiter: str = ","
    quoted: bool = True
    nulls: tuple[str, ...] = ("",)
    names: tuple[str, ...] | None = None


class DelimitedFile:
    """One file, as a `BlockFile`; a row is a line, whatever it holds.

    Args:
        path (str | Path): of the file.
        columns (Columns): that are read.
        dialect (Dialect): of the file.
        labels (Labels): "optional": the file may lack the label's column.
        on_bad_row (OnBadRow): "error": the first row and the last one are checked at once.

    Raises:
        DataError: missing or unreadable; a column that is not there; a bad first or last row.
    """

    def __init__(
        self, path: str | Path, columns: Columns, dialect: Dialect, labels: Labels, on_bad_row: OnBadRow
    ) -> None:
        self._text, self._columns, self._dialect = TextFile(path), columns, dialect
        self._first = 0 if dialect.names is not None else 1  # line of the first row
        if self.num_rows == 0:
            return
        self._names = self._column_names(labels)
        self._reader = ColumnReader(self.name, columns, self._names, labels)
        if on_bad_row == "error":
            with closing(self._text.blocks(self._first)) as blocks:
                self._check(0, next(blocks).partition(b"\n")[0])
            self._check(self.num_rows - 1, self._text.last_line)

    @property
    def name(self) -> str:
        return str(self._text.path)

    @property
    def num_rows(self) -> int:
        return max(self._text.num_lines - self._first, 0)

    def blocks(self, start: int) -> Generator[Block, None, None]:
        # Closed by hand: a consumer that stops early leaves it suspended, a file and a thread open.
        with closing(self._text.blocks(start + self._first)) as blocks:
            yield from mapped(self._parse, blocks, _PARSERS)

    def location(self, row: int) -> str:
        return f"{self.name}:{row + self._first + 1}"

    def quoted(self, row: int, feature: int) -> str:
        with closing(self._text.blocks(row + self._first)) as blocks:
            table, _, _ = self._cut(next(blocks).partition(b"\n")[0] + b"\n")
        return quoted(table.column(self._columns.ids[feature])[0].as_py())

    def _column_names(self, labels: Labels) -> list[str]:
        with closing(self._text.blocks(0)) as blocks:
            line = next(blocks).partition(b"\n")[0].removeprefix(_BYTE_ORDER_MARK)
        text = line.decode("utf-8", "replace").rstrip("\r")
        first = text.split(self._dialect.delimiter)
        if self._dialect.quoted:
            first = next(csv.reader([text], delimiter=self._dialect.delimiter))
        if self._dialect.names is None:
            if twice := [name for name in first if first.count(name) > 1]:
                raise DataError(f"{self.name}:1", f"two columns are called {twice[0]!r}")
            return first
        names = list(self._dialect.names)
        if labels == "optional" and len(first) == len(names) - 1 and self._columns.label in names:
            names.remove(self._columns.label)
        return names

    def _check(self, row: int, line: bytes) -> None:
        _, problems = self._parse(line + b"\n")
        if problems:
            cut = "; the file ends within this line" if row == self.num_rows - 1 and self._text.is_cut else ""
            raise DataError(self.location(row), problems[0] + cut)

    def _parse(self, text: bytes) -> Block:
        """Returns the rows of ``text``, which ends with a newline, and the faults of bad ones by position."""
        table, positions, faults = self._cut(text)
        arrays = {name: table.column(name).combine_chunks() for name in self._reader.names}
        rows, of_values = self._reader.rows(arrays, len(table))
        if not faults:
            return rows, of_values
        # A line that cannot be cut becomes the blank row that stands after the others.
        place = np.full(len(table) + len(faults), len(table))
        place[positions] = np.arange(len(table))
        faults |= {int(positions[i]): fault for i, fault in of_values.items()}
        return rows.padded(len(table) + 1).take(place), faults

    def _cut(self, text: bytes) -> tuple[pa.Table, Array, dict[int, str]]:
        """Returns the columns of the lines that have all of them, the positions of these lines, and others' faults."""
        num_lines = text.count(b"\n")
        table, faults = self._read(text)
        if len(table) + len(faults) != num_lines:
            # A carriage return within a line, or quotes that are not closed in it, misled the reader about those after.
            if num_lines == 1:
                return table.slice(0, 0), np.empty(0, np.int64), {0: _MISLED}
            middle = lines_cut(text, num_lines // 2)
            table, positions, faults = self._cut(text[:middle])
            more, more_positions, more_faults = self._cut(text[middle:])
            faults |= {i + num_lines // 2: fault for i, fault in more_faults.items()}
            return pa.concat_tables([table, more]), np.append(positions, more_positions + num_lines // 2), faults
        good = np.ones(num_lines, bool)
        good[list(faults)] = False
        if all(column.null_count for column in table.columns):  # else no line is blank
            blank = np.array([not line.strip(b"\r") for line in text[:-1].split(b"\n")])
            table = table.filter(pa.array(~blank[good]))
            faults |= dict.fromkeys(np.flatnonzero(blank).tolist(), "an empty line")
            good &= ~blank
        return table, np.flatnonzero(good), faults

    def _read(self, text: bytes) -> tuple[pa.Table, dict[int, str]]:
        """Returns what Arrow's reader does: the columns that are needed, and the faults of lines without them all."""
        faults: dict[int, str] = {}

        def fault(row: csv_reader.InvalidRow) -> str:
            columns = f"{row.actual_columns} columns; allowed: {row.expected_columns}"
            faults[row.number - 1] = _MISLED if self._dialect.quoted and row.text.count('"') % 2 else columns
            return "skip"

        wanted = {name: pa.binary() for name in self._reader.names}
        if b"\r" in text and text.count(b"\r") != text.count(b"\r\n"):
            return pa.table({name: pa.array([], kind) for name, kind in wanted.items()}), faults
        table = csv_reader.read_csv(
            pa.BufferReader(text),
            # One thread, which alone numbers its lines; several texts are read at a time.
            csv_reader.ReadOptions(use_threads=False, column_names=self._names, block_size=len(text) + 1),
            csv_reader.ParseOptions(
                delimiter=self._dialect.delimiter,
                quote_char='"' if self._dialect.quoted else False,
                ignore_empty_lines=False,
                invalid_row_handler=fault,
            ),
            csv_reader.ConvertOptions(
                check_utf8=False,
                column_types=wanted,
                include_columns=self._reader.names,
                null_values=list(self._dialect.nulls),
                strings_can_be_null=True,
            ),
        )
        return table, faults


def delimited_source(
    paths: Sequence[str | Path],
    columns: Columns,
    dialect: Dialect,
    labels: Labels = "needed",
    on_bad_row: OnBadRow = "error",
) -> SequentialSource:
    """Returns the rows of the files, one after the other.

    Raises:
        DataError: see `DelimitedFile`; no file has any row.
    """
    return SequentialSource([DelimitedFile(path, columns, dialect, labels, on_bad_row) for path in paths])
