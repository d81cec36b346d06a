"""Rows of Arrow columns, whichever file they come from."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from launch.data.errors import DataError
from launch.data.folder_columns import folder_columns, repeated
from launch.data.id_values import ALLOWED_TYPES, NUMBERS, id_values, is_id_type, is_one_of
from launch.data.rows import Array, segments
from launch.data.source import Block
from launch.data.validity import Labels, Validity
from launch.sections import ParquetSection

_SHOWN = 40  # characters of a value in a message
_COLUMNS_SHOWN = 50
_WORDS = {r"(?i)^true$": 1, r"(?i)^false$": 0}  # pandas and Spark write a column of booleans so
_PLAIN_NUMBER = r"^-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9])?$"  # Arrow reads any of these, and most others


class ColumnReader:
    """Makes rows of the columns of one file, and of those that its folders name.

    Args:
        path (str): of the file.
        columns (ParquetSection): that are read.
        found (Sequence[str]): names of the file's columns.
        labels (Labels): how labels are read.

    Attributes:
        names (list[str]): of all columns that are read from the file, each once.
        of_folders (dict[str, bytes | None]): the value of each column that the file lacks and a folder has.

    Raises:
        DataError: the file lacks a column, or has two of its name.
    """

    def __init__(self, path: str, columns: ParquetSection, found: Sequence[str], labels: Labels) -> None:
        self._path, self._columns = path, columns
        of_folders = {name: value for name, value in folder_columns(path).items() if name not in found}
        self._labelled = not labels.optional or columns.label in (*found, *of_folders)
        label = [columns.label] if self._labelled else []
        wanted = list(dict.fromkeys((*label, *columns.dense, *columns.ids)))
        for name in wanted:
            if name not in found and name not in of_folders:
                raise DataError(path, f"no column {name!r}; it has {_names([*found, *of_folders])}")
            if found.count(name) > 1:
                raise DataError(path, f"{found.count(name)} columns are called {name!r}; allowed: one")
        self.names = [name for name in wanted if name in found]
        self.of_folders = {name: value for name, value in of_folders.items() if name in wanted}
        self._validity = Validity(columns.label, columns.dense, labels)

    def check_types(self, schema: pa.Schema) -> None:
        """Checks the types of a file that has a schema.

        Raises:
            DataError: a column of another type.
        """
        for name in self.names:
            kind = schema.field(name).type
            # A column may be of ids and of numbers at once.
            if name in self._columns.ids and not is_id_type(kind):
                raise DataError(self._path, f"column {name!r} is of type {kind}; allowed: {ALLOWED_TYPES}")
            if name in (self._columns.label, *self._columns.dense) and not _is_number(kind):
                raise DataError(self._path, f"column {name!r} is of type {kind}; allowed: numbers")

    def rows(self, arrays: Mapping[str, pa.Array], num_rows: int) -> Block:
        """Returns the rows of the columns' arrays; text is converted to numbers if it can be."""
        wrong: dict[int, str] = {}
        arrays = {**arrays, **{name: repeated(value, num_rows) for name, value in self.of_folders.items()}}

        def quote(i: int, name: str) -> str:
            return quoted(arrays[name][i].as_py())

        def report(name: str, positions: Array, allowed: str) -> None:
            for i in positions.tolist():
                wrong.setdefault(i, f"{name} is {quote(i, name)}; allowed: {allowed}")

        labels = np.full(num_rows, np.nan)
        if self._labelled:
            labels = _numbers(arrays[self._columns.label], pa.float64())
        dense = np.empty((num_rows, len(self._columns.dense)), np.float32)
        for j, name in enumerate(self._columns.dense):
            dense[:, j] = _numbers(arrays[name], pa.float32())
        parts = [
            id_values(arrays[name], name in self._columns.hexadecimal, partial(report, name))
            for name in self._columns.ids
        ]
        ids, lengths = _row_major(parts)
        return self._validity.block(labels, dense, ids, (1,) * len(parts), lengths, wrong, quote)


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_number(kind.value_type)
    return is_one_of(kind, (*NUMBERS, pa.types.is_decimal))


def _numbers(column: pa.Array, kind: pa.DataType) -> Array:
    """Returns floats, NaN for a missing value, and infinity for text that is no number, so that it is refused."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_binary(column.type):
        return _numbers_of_text(column.view(pa.string()), kind)
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    return column.cast(kind, safe=False).to_numpy(zero_copy_only=False)


def _numbers_of_text(column: pa.Array, kind: pa.DataType) -> Array:
    try:
        return column.cast(kind).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        text = column.view(pa.binary())
        plain = pc.match_substring_regex(text, _PLAIN_NUMBER)
        numbers = pc.if_else(plain, column, None).cast(kind).to_numpy(zero_copy_only=False).copy()
        others = ~plain.fill_null(True).to_numpy(zero_copy_only=False)
        for word, number in _WORDS.items():
            is_word = pc.match_substring_regex(text, word).fill_null(False).to_numpy(zero_copy_only=False)
            numbers[is_word] = number
            others &= ~is_word
        for i in np.flatnonzero(others).tolist():
            numbers[i] = _number(column.slice(i, 1), kind)
        return numbers


def _number(column: pa.Array, kind: pa.DataType) -> float:
    try:
        return float(column.cast(kind).to_numpy(zero_copy_only=False)[0])
    except pa.ArrowInvalid:
        return np.inf


def _names(columns: Sequence[str]) -> str:
    """Returns the names of columns for a message, those in quotes whose ends or commas would not be seen."""
    shown = [repr(name) if name != name.strip() or "," in name else name for name in columns[:_COLUMNS_SHOWN]]
    more = f" and {len(columns) - _COLUMNS_SHOWN} more" if len(columns) > _COLUMNS_SHOWN else ""
    return ", ".join(shown) + more


def quoted(value: Any) -> str:
    """Returns a value for a message, text in quotes; a long one is cut, and ends in dots.

    Example:
        >>> quoted(b"u_1"), quoted(1.5), quoted([b"a", None]), quoted("0" * 50)
        ("'u_1'", '1.5', "['a', None]", "'0000000000000000000000000000000000000000'...")
    """
    if isinstance(value, list):
        shown = ", ".join(quoted(item) for item in value[:_SHOWN])
        return f"[{shown}{', ...' if len(value) > _SHOWN else ''}]"
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return f"{value[:_SHOWN]!r}{'...' if len(value) > _SHOWN else ''}"
    return str(value)


def _row_major(parts: Sequence[tuple[Array, Array | None]]) -> tuple[Array, Array | None]:
    """Joins the ids of all features: (B, F), or (N,) row by row with lengths (B, F) if any column is of lists."""
    if all(lengths is None for _, lengths in parts):
        return np.stack([values for values, _ in parts], axis=1), None
    lengths = np.stack([np.ones(len(v), np.int64) if n is None else n for v, n in parts])
    flat = np.concatenate([values for values, _ in parts])
    counts = lengths.reshape(-1)
    starts = np.cumsum(counts) - counts
    order = np.arange(lengths.size).reshape(lengths.shape).T.reshape(-1)
    return flat[segments(starts, counts, order)], np.ascontiguousarray(lengths.T)
