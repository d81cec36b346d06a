"""Rows as Parquet files."""

from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launch.data.columns import ColumnReader, quoted
from launch.data.errors import readable
from launch.data.source import Block
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
        with readable(path, "Parquet", pa.ArrowException):
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
        if column in self._reader.of_folders:
            return quoted(self._reader.of_folders[column])
        return quoted(next(self._batches(row, [column])).column(column)[0].as_py())

    def _batches(self, start: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        group = int(np.searchsorted(self._group_ends, start, side="right"))
        skip = start - (int(self._group_ends[group - 1]) if group else 0)
        with readable(self.name, "Parquet", pa.ArrowException), pq.ParquetFile(self.name) as file:
            groups = list(range(group, len(self._group_ends)))
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=columns):
                if skip < len(batch):
                    yield batch.slice(skip)
                skip = max(skip - len(batch), 0)
