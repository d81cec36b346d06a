"""Click logs as Parquet: integers, hexadecimal strings, or lists of integers for several ids per row."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from launch.data.errors import DataError
from launch.data.rows import MISSING, Array, Rows, segments
from launch.data.source import Block, Labels, SequentialSource
from launch.data.text import readable

_BATCH = 16_384


class ParquetFile:
    """One file, as a `BlockFile`.

    A hexadecimal string is what Criteo's text has; a negative 32-bit integer is such a hash read as signed. Null is a
    missing value; in a list it is not allowed. With ``labels="optional"`` the label's column may be missing.

    Raises:
        DataError: missing, unreadable, empty, not Parquet; a column that is not there, or of the wrong type.
    """

    def __init__(
        self, path: str | Path, label: str, dense: Sequence[str], ids: Sequence[str], labels: Labels = "needed"
    ) -> None:
        self.path = Path(path)
        with self._reading():
            metadata = pq.read_metadata(path)
            schema = pq.read_schema(path)
        self._labels = [label] if labels == "needed" or label in schema.names else []
        self._dense, self._ids = list(dense), list(ids)
        self.num_rows: int = metadata.num_rows
        if self.num_rows == 0:
            raise DataError(str(path), "empty")
        self._group_ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        for column in (*self._labels, *dense, *ids):
            if column not in schema.names:
                raise DataError(str(path), f"no column {column!r}; it has {', '.join(schema.names)}")
            self._check_type(column, schema.field(column).type, ids=column in ids)

    def blocks(self, start: int) -> Iterator[Block]:
        group = int(np.searchsorted(self._group_ends, start, side="right"))
        skip = start - (int(self._group_ends[group - 1]) if group else 0)
        with self._reading(), pq.ParquetFile(self.path) as file:
            columns = list(dict.fromkeys((*self._labels, *self._dense, *self._ids)))
            groups = list(range(group, len(self._group_ends)))
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=columns):
                if skip >= len(batch):
                    skip -= len(batch)
                    continue
                yield self._rows(batch.slice(skip))
                skip = 0

    def location(self, row: int) -> str:
        return f"{self.path}:{row + 1}"

    def _rows(self, batch: pa.RecordBatch) -> Block:
        problems: dict[int, str] = {}

        def report(positions: Array, problem: str, values: Any) -> None:
            for i in positions.tolist():
                problems.setdefault(i, problem.format(values[i]))

        labels = np.full(len(batch), np.nan, np.float32)
        for column in self._labels:
            labels = _numbers(batch.column(column)).copy()  # Arrow's own memory is not to be written
            report(np.flatnonzero((labels != 0) & (labels != 1)), "label is {}; allowed: 0, 1", batch.column(column))
        dense = np.stack([_numbers(batch.column(column)) for column in self._dense], axis=1)
        parts = []
        for column in self._ids:
            values, lengths = _ids(batch.column(column), lambda i, p, v, c=column: report(i, f"{c} is {{}}; {p}", v))
            parts.append((values, lengths))
        ids, all_lengths = _row_major(parts)
        rows = Rows(labels, dense, ids, (1,) * len(parts), all_lengths)
        return rows.without(np.array(sorted(problems), np.int64)), problems

    def _check_type(self, column: str, kind: pa.DataType, ids: bool) -> None:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if ids:
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            right = text or pa.types.is_integer(kind) or (is_list and pa.types.is_integer(kind.value_type))
            allowed = "integers, strings, or lists of integers"
        else:
            right = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            allowed = "numbers"
        if not right:
            raise DataError(str(self.path), f"column {column!r} is of type {kind}; allowed: {allowed}")

    def _reading(self) -> "_Reading":
        return _Reading(self.path)


class _Reading:
    """Turns errors of reading a Parquet file into `DataError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._system = readable(path)

    def __enter__(self) -> None:
        self._system.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pa.ArrowException) and not isinstance(error, OSError):
            raise DataError(str(self._path), f"not Parquet, or corrupt: {error}") from error
        self._system.__exit__(kind, error, trace)


def parquet_source(
    paths: Sequence[str | Path], label: str, dense: Sequence[str], ids: Sequence[str], labels: Labels = "needed"
) -> SequentialSource:
    """Returns the rows of the files, one after the other."""
    return SequentialSource([ParquetFile(path, label, dense, ids, labels) for path in paths])


def _numbers(column: pa.Array) -> Array:
    return pc.cast(column, pa.float32(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


def _ids(column: pa.Array, report: Any) -> tuple[Array, Array | None]:
    """Returns ids (B,), or (N,) with their lengths (B,) from a column of lists."""
    kind = column.type
    if pa.types.is_integer(kind):
        return _integers(column, report), None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values, wrong = _hexadecimal(column)
        report(np.flatnonzero(wrong), "allowed: 1 to 8 hexadecimal digits", column)
        return values, None
    lengths = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    row = np.repeat(np.arange(len(column)), lengths)
    flat = column.flatten()  # without what null entries hide
    has_null = flat.is_null().to_numpy(zero_copy_only=False)
    report(np.unique(row[has_null]), "allowed: no null in a list", column)
    values = _integers(flat.fill_null(0), lambda i, p, _: report(np.unique(row[i]), p, column))
    return values, lengths


def _integers(column: pa.Array, report: Any) -> Array:
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    if values.dtype == np.int32:
        values = values.view(np.uint32)
    if values.dtype == np.uint64:
        report(np.flatnonzero(values >= 2**63), "allowed: below 2^63", column)
        values = values & np.uint64(2**63 - 1)
    values = values.astype(np.int64)
    report(np.flatnonzero(values < 0), "allowed: at least 0", column)
    missing = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(missing, MISSING, np.maximum(values, 0))


def _hexadecimal(column: pa.Array) -> tuple[Array, Array]:
    # The distinct ones alone, of which there are fewer than rows.
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    values = np.zeros(len(texts) + 1, np.int64)
    wrong = np.zeros(len(texts) + 1, bool)
    values[-1] = MISSING
    for i, text in enumerate(texts):
        if len(text) <= 8 and not text.strip("0123456789abcdefABCDEF"):
            values[i] = int(text, 16) if text else MISSING
        else:
            wrong[i] = True
    index = encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    return values[index], wrong[index]


def _row_major(parts: list[tuple[Array, Array | None]]) -> tuple[Array, Array | None]:
    """Joins the ids of all features: (B, F), or (N,) row by row with lengths (B, F) if any column is of lists."""
    if all(lengths is None for _, lengths in parts):
        return np.stack([values for values, _ in parts], axis=1), None
    lengths = np.stack([np.ones(len(v), np.int64) if n is None else n for v, n in parts])
    flat = np.concatenate([values for values, _ in parts])
    counts = lengths.reshape(-1)
    starts = np.cumsum(counts) - counts
    order = np.arange(lengths.size).reshape(lengths.shape).T.reshape(-1)
    return flat[segments(starts, counts, order)], np.ascontiguousarray(lengths.T)
