"""What `torchrec_qr.compress_` has done, table by table."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_qr.compression.fit import Fit
from torchrec_qr.configs import is_compositional, stored_bytes

_MIB = 2**20


@dataclass(frozen=True)
class CompressedTable:
    """One table of the report.

    Args:
        name (str): of the table.
        collection (str): the path of the table's collection in the model.
        rows (int): S.
        stored_rows (int): R, or S for a table that stays plain.
        bytes_before (int): of the full table.
        bytes_after (int): of what is stored now.
        partitions (str): the operation and the rows of each partition, or ``plain``.
        error (float | None): ‖E - Ê‖ / ‖E‖ of a table that was fitted.
        weighted_error (float | None): the same by the frequencies of ids, if they were given.
    """

    name: str
    collection: str
    rows: int
    stored_rows: int
    bytes_before: int
    bytes_after: int
    partitions: str
    error: float | None = None
    weighted_error: float | None = None


@dataclass(frozen=True)
class CompressionReport:
    """What `torchrec_qr.compress_` has done. ``print`` shows it as a table.

    Args:
        tables (Sequence[CompressedTable]): the tables of all collections, in the order of the model.
        budget (int | None): the bytes that were allowed.
    """

    tables: Sequence[CompressedTable]
    budget: int | None = None

    @property
    def bytes_before(self) -> int:
        """The bytes of all full tables."""
        return sum(table.bytes_before for table in self.tables)

    @property
    def bytes_after(self) -> int:
        """The bytes that all tables store now."""
        return sum(table.bytes_after for table in self.tables)

    @property
    def ratio(self) -> float:
        """How many times fewer bytes are stored."""
        return _ratio(self.bytes_before, self.bytes_after)

    def __str__(self) -> str:
        fitted = any(table.error is not None for table in self.tables)
        weighted = any(table.weighted_error is not None for table in self.tables)
        head = ["table", "rows", "stored rows", "MiB", "stored MiB", "ratio", *["error"] * fitted]
        head += [*["weighted error"] * weighted, "partitions"]
        lines = [head]
        for table in self.tables:
            line = [table.name, *_sizes([table])]
            line += [_decimal(table.error)] * fitted + [_decimal(table.weighted_error)] * weighted
            lines.append([*line, table.partitions])
        lines.append(["total", *_sizes(self.tables), *[""] * (fitted + weighted), ""])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
        if self.budget is not None:
            text.append(f"budget {self.budget / _MIB:,.3f} MiB")
        return "\n".join(text)


def compressed_table(
    collection: str, before: BaseEmbeddingConfig, after: BaseEmbeddingConfig, fit: Fit | None
) -> CompressedTable:
    """Returns the line of a table, from its config before and after, and its fit."""
    partitions, stored_rows = "plain", after.num_embeddings
    if is_compositional(after):
        sizes = " + ".join(f"{size:,}" for size in after.bound_partitions.sizes)
        partitions, stored_rows = f"{after.operation} of {sizes}", after.physical_rows
    return CompressedTable(
        name=after.name,
        collection=collection,
        rows=after.num_embeddings,
        stored_rows=stored_rows,
        bytes_before=stored_bytes(before),
        bytes_after=stored_bytes(after),
        partitions=partitions,
        error=None if fit is None else fit.error,
        weighted_error=None if fit is None else fit.weighted_error,
    )


def _sizes(tables: Sequence[CompressedTable]) -> list[str]:
    before, after = sum(t.bytes_before for t in tables), sum(t.bytes_after for t in tables)
    return [
        f"{sum(t.rows for t in tables):,}",
        f"{sum(t.stored_rows for t in tables):,}",
        f"{before / _MIB:,.3f}",
        f"{after / _MIB:,.3f}",
        f"{_ratio(before, after):,.2f}",
    ]


def _ratio(before: int, after: int) -> float:
    return before / after if after else 1.0


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Returns the cells of a line, numbers to the right, and the first and last columns to the left."""
    cells = list(zip(line, widths, strict=True))
    inner = [cell.rjust(width) for cell, width in cells[1:-1]]
    return [cells[0][0].ljust(cells[0][1]), *inner, cells[-1][0]]
