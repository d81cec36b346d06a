"""What a lookup must know of its tables besides their weights: plain numbers, in which every backend is told."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_qr.partitions import BoundPartitions, ClosedForm

OPERATIONS = ("mult", "add", "concat")


class PartitionLayout(NamedTuple):
    """Row of an id: ``(id // divisor) % modulus - first_row``, or ``class_map[id] - first_row`` if ``divisor`` is 0."""

    width: int
    divisor: int = 0
    modulus: int = 0
    first_row: int = 0
    map_row: int = 0


class CodeLayout(NamedTuple):
    """How an id follows from the code that travels in its place; see `torchrec_qr.distributed.codes`.

    row = code // per_row + first_row, rest = code % per_row; id = rest where ``stride`` is 0, else
    rest % stride + stride · (row + size · (rest // stride)).
    """

    per_row: int
    stride: int
    size: int
    first_row: int

    def ids_of(self, codes: Tensor) -> Tensor:
        """Returns (N,) int64: the ids that codes (N,) int64 stand for."""
        row, rest = codes // self.per_row + self.first_row, codes % self.per_row
        if not self.stride:
            return rest
        return rest % self.stride + self.stride * (row + self.size * (rest // self.stride))


class TableLayout(NamedTuple):
    """One table of a lookup.

    Args:
        operation: one of ``OPERATIONS``.
        partitions: K of them, in order.
        num_features: consecutive features of the batch that are looked up here.
        num_ids: S; -1: any id at all, for closed forms.
        mean: whether the sum of a bag is divided by its number of ids.
        code: None where ids travel.
    """

    operation: str
    partitions: tuple[PartitionLayout, ...]
    num_features: int = 1
    num_ids: int = -1
    mean: bool = False
    code: CodeLayout | None = None

    @property
    def dim(self) -> int:
        """D: columns of the table's output per feature."""
        widths = [p.width for p in self.partitions]
        return sum(widths) if self.operation == "concat" else widths[0]

    @property
    def has_map(self) -> bool:
        """Whether an explicit map gives the rows."""
        return self.partitions[0].divisor == 0


def partition_layouts(
    partitions: BoundPartitions, widths: Mapping[int, int], first_rows: Mapping[int, int] | None = None
) -> tuple[PartitionLayout, ...]:
    """Returns the layouts of those partitions that ``widths`` names, by their widths; in its order.

    Args:
        partitions: which row of each partition an id selects.
        widths: columns per partition.
        first_rows: the first row that is stored, where that is not 0.

    Example:
        >>> from torchrec_qr import QuotientRemainder
        >>> partition_layouts(QuotientRemainder(num_collisions=4).bind(100), {0: 8, 1: 8})[1]
        PartitionLayout(width=8, divisor=25, modulus=4, first_row=0, map_row=0)
    """
    first_rows = first_rows or {}
    if isinstance(partitions, ClosedForm):
        return tuple(
            PartitionLayout(width, partitions.strides[j], partitions.sizes[j], first_rows.get(j, 0))
            for j, width in widths.items()
        )
    return tuple(PartitionLayout(w, first_row=first_rows.get(j, 0), map_row=j) for j, w in widths.items())


def encode(tables: list[TableLayout]) -> list[int]:
    """Returns the layouts as one list of integers, as an operator of ``torch.library`` takes them.

    Example:
        >>> table = TableLayout("mult", (PartitionLayout(8, 1, 25), PartitionLayout(8, 25, 4)), num_ids=100)
        >>> decode(encode([table, table])) == [table, table]
        True
    """
    out: list[int] = []
    for t in tables:
        out += [OPERATIONS.index(t.operation), t.num_features, t.num_ids, int(t.mean)]
        out += [0, 0, 0, 0] if t.code is None else t.code
        out.append(len(t.partitions))
        for p in t.partitions:
            out += p
    return out


def decode(layout: list[int] | tuple[int, ...]) -> list[TableLayout]:
    """The inverse of `encode`."""
    tables = []
    numbers = iter(layout)

    def take(n: int) -> list[int]:
        return [next(numbers) for _ in range(n)]

    while (operation := next(numbers, None)) is not None:
        num_features, num_ids, mean = take(3)
        code = take(4)
        partitions = tuple(PartitionLayout(*take(len(PartitionLayout._fields))) for _ in range(next(numbers)))
        tables.append(
            TableLayout(
                OPERATIONS[operation],
                partitions,
                num_features,
                num_ids,
                bool(mean),
                CodeLayout(*code) if code[0] else None,
            )
        )
    return tables


def ids_of(table: TableLayout, ids: Tensor) -> Tensor:
    """Returns (N,) int64: the ids that codes stand for, or what was given, where ids travel."""
    ids = ids.to(torch.int64)
    return ids if table.code is None else table.code.ids_of(ids)


def rows_of(table: TableLayout, ids: Tensor, class_map: Tensor | None) -> list[Tensor]:
    """Returns K tensors (N,) int64: the rows that ids, or codes, select, in PyTorch."""
    ids = ids_of(table, ids)
    if class_map is not None:
        return [class_map[p.map_row].index_select(0, ids).to(torch.int64) - p.first_row for p in table.partitions]
    return [ids // p.divisor % p.modulus - p.first_row for p in table.partitions]
