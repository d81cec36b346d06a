"""Rows as lines of text: columns between delimiters, plain or gzip, read by Arrow's CSV reader."""

import csv
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as csv_reader

from launch.data.columns import ColumnReader, quoted
from launch.data.errors import DataError, OnBadRow
from launch.data.prefetch import mapped
from launch.data.rows import Array
from launch.data.source import Block
from launch.data.text import BYTE_ORDER_MARK, TextFile
from launch.data.validity import Labels
from launch.sections import CsvSection

_PARSERS = 2  # threads: Arrow, which does the work, leaves the interpreter to others meanwhile
_OTHER_DELIMITERS = ",;\t|"
_MISLED = "a line with a carriage return or an open quote"


class _LineCutter:
    """Counts the columns of single lines, as Arrow's reader does: quotes count where a value begins."""

    def __init__(self, dialect: CsvSection) -> None:
        self._quoted, self._delimiter = dialect.quoted, dialect.delimiter.encode()
        delimiter = re.escape(self._delimiter)
        self._closed = re.compile(rb'(^|%s)"(?:[^"]|"")*+"' % delimiter)
        self._open = re.compile(rb'(?:^|%s)"' % delimiter)

    def num_columns(self, line: bytes) -> int | None:
        """Returns the number, or None: a carriage return or an open quote is in the line."""
        if b"\r" in line:
            return None
        if not line:
            return 0
        if self._quoted and b'"' in line:
            line = self._closed.sub(rb"\1", line)
            if self._open.search(line):
                return None
        return line.count(self._delimiter) + 1

    def faults(self, lines: Sequence[bytes], num_columns: int) -> dict[int, str]:
        """Returns the faults of those ``lines`` that cannot be cut into so many columns, by position."""
        faults: dict[int, str] = {}
        for i, line in enumerate(lines):
            line = line.removesuffix(b"\r")
            found = self.num_columns(line)
            if not line:
                faults[i] = "an empty line"
            elif found is None:
                faults[i] = _MISLED
            elif found != num_columns:
                faults[i] = f"{found} columns; allowed: {num_columns}"
        return faults


class DelimitedFile:
    """One file, as a `BlockFile`; every line is a row.

    Args:
        path (str | Path): of the file.
        columns (CsvSection): that are read, and how lines are cut into them.
        labels (Labels): how they are read. A file lacks the column of optional labels if its first and last lines have
            one column less than ``columns.names``.
        on_bad_row (OnBadRow): "error": the first row and the last one are checked at once.

    Raises:
        DataError: missing or unreadable; a column that is not there; a bad first or last row.
    """

    def __init__(self, path: str | Path, columns: CsvSection, labels: Labels, on_bad_row: OnBadRow) -> None:
        self._text, self._columns = TextFile(path), columns
        self._cutter = _LineCutter(columns)
        self._first = 0 if columns.names is not None else 1  # line of the first row
        if self.num_rows == 0:
            if self._text.num_lines:
                self._check_header(self._text.last_line)  # a file of carriage returns alone is one line, and not empty
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
        # Close it here, because a consumer that stops early leaves it suspended, with a file and a thread open.
        with closing(self._text.blocks(start + self._first)) as blocks:
            yield from mapped(self._parse, blocks, _PARSERS)

    def location(self, row: int) -> str:
        return f"{self.name}:{row + self._first + 1}"

    def quoted(self, row: int, feature: int) -> str:
        column = self._columns.ids[feature]
        if column in self._reader.of_folders:
            return quoted(self._reader.of_folders[column])
        with closing(self._text.blocks(row + self._first)) as blocks:
            table, _, _ = self._cut(next(blocks).partition(b"\n")[0] + b"\n")
        return quoted(table.column(column)[0].as_py())

    def _column_names(self, labels: Labels) -> list[str]:
        with closing(self._text.blocks(0)) as blocks:
            line = next(blocks).partition(b"\n")[0].removesuffix(b"\r")
        if self._columns.names is not None:
            names = list(self._columns.names)
            # Look at the last line too, because one malformed line must not give all others another meaning.
            first, last = self._cutter.num_columns(line), self._cutter.num_columns(self._text.last_line)
            if labels.optional and first == len(names) - 1 and last != len(names) and self._columns.label in names:
                names.remove(self._columns.label)
            return names
        self._check_header(line)
        names = self._names_of(line.decode("utf-8", "replace"))
        if len(names) == 1 and any(other in names[0] for other in _OTHER_DELIMITERS):
            allowed = f"columns with {self._columns.delimiter!r} between them, which is data.csv.delimiter"
            raise DataError(f"{self.name}:1", f"one column, {quoted(names[0])}; allowed: {allowed}")
        return names

    def _names_of(self, header: str) -> list[str]:
        if not self._columns.quoted:
            return header.split(self._columns.delimiter)
        try:
            return next(csv.reader([header], delimiter=self._columns.delimiter))
        except csv.Error as error:
            raise DataError(f"{self.name}:1", f"the names of the columns cannot be read: {error}") from error

    def _check_header(self, line: bytes) -> None:
        if self._cutter.num_columns(line) is None:
            raise DataError(f"{self.name}:1", _MISLED)

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
        # A quote that is open at the end takes in no other line, so that the number of rows does not show it.
        last = text[text.rfind(b"\n", 0, -1) + 1 : -1].removesuffix(b"\r")
        returns = text.count(b"\r")
        only_at_ends = returns == 0 or returns == text.count(b"\r\n")
        if only_at_ends and self._cutter.num_columns(last) is not None:
            try:
                table = self._read(text)
            except pa.ArrowInvalid:  # a line without all columns
                table = None
            # Rows are fewer than lines if quotes that are not closed in their line have taken in others.
            if table is not None and len(table) == num_lines and not _has_blank_line(table, text):
                return table, np.arange(num_lines), {}
        lines = text.split(b"\n")[:-1]
        faults = self._cutter.faults(lines, len(self._names))
        good = np.delete(np.arange(num_lines), list(faults))
        table = self._read(b"".join(lines[i] + b"\n" for i in good.tolist()))
        return table, good, faults

    def _read(self, text: bytes) -> pa.Table:
        """Returns the columns that are needed, of lines that Arrow's reader cuts as they are meant."""
        wanted = {name: pa.binary() for name in self._reader.names}
        if not text:
            return pa.table({name: pa.array([], kind) for name, kind in wanted.items()})
        if text.startswith(BYTE_ORDER_MARK):
            text = BYTE_ORDER_MARK + text  # the reader drops one
        return csv_reader.read_csv(
            pa.BufferReader(text),
            # Take one thread, because several texts are read at a time.
            csv_reader.ReadOptions(use_threads=False, column_names=self._names, block_size=len(text) + 1),
            csv_reader.ParseOptions(
                delimiter=self._columns.delimiter,
                quote_char='"' if self._columns.quoted else False,
                ignore_empty_lines=False,
            ),
            csv_reader.ConvertOptions(
                check_utf8=False,
                column_types=wanted,
                include_columns=self._reader.names,
                null_values=list(self._columns.nulls),
                strings_can_be_null=True,
            ),
        )


def _has_blank_line(table: pa.Table, text: bytes) -> bool:
    if pc.all(pc.greater(pc.binary_length(table.column(0)), 0), skip_nulls=False).as_py():
        return False  # found in less time
    return text.startswith((b"\n", b"\r\n")) or b"\n\n" in text or b"\n\r\n" in text
