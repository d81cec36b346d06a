"""Rows as Parquet files."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launch.data.columns import ColumnReader, quoted
from launch.data.errors import DataError
from launch.data.source import Block
from launch.data.text import readable
from launch.data.validity import Labels
from launch.sections import ParquetSection

_BATCH = 16_384


class ParquetFile:
    """One file, as a `BlockFile`.

    Args:
        path (str | Path): of the file.
        columns (ParquetSection): that are read.
        labels (Labels): how they are read.

    Raises:
        DataError: missing, unreadable, not Parquet; a column that is not there, or of the wrong type.
    """

    def __init__(self, path: str | Path, columns: ParquetSection, labels: Labels) -> None:
        self.name, self._columns = str(path), columns
        with _Reading(path):
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        self.num_rows: int = metadata.num_rows
        self._group_ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        self._reader = ColumnReader(self.name, columns, schema.names, labels)
        self._reader.check_types(schema)

    def blocks(self, start: int) -> Generator[Block, None, None]:
        for batch in self._batches(start, self._reader.names):
            yield self._reader.rows({name: batch.column(name) for name in self._reader.names}, len(batch))

    def location(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def quoted(self, row: int, feature: int) -> str:
        column = self._columns.ids[feature]
        return quoted(next(self._batches(row, [column])).column(column)[0].as_py())

    def _batches(self, start: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        group = int(np.searchsorted(self._group_ends, start, side="right"))
        skip = start - (int(self._group_ends[group - 1]) if group else 0)
        with _Reading(self.name), pq.ParquetFile(self.name) as file:
            groups = list(range(group, len(self._group_ends)))
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=columns):
                if skip < len(batch):
                    yield batch.slice(skip)
                skip = max(skip - len(batch), 0)


class _Reading:
    """Turns errors of reading a Parquet file into `DataError`."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._system = readable(path)

    def __enter__(self) -> None:
        self._system.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pa.ArrowException) and not isinstance(error, OSError):
            raise DataError(str(self._path), f"not Parquet, or corrupt: {error}") from error
        self._system.__exit__(kind, error, trace)
