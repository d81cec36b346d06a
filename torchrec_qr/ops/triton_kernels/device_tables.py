"""Descriptors of tables on the device, as the kernels read them; made once for tables at the same addresses."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..description import Description, PartitionLayout, TableLayout
from . import id_rows as fields

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDEST_READ = fields.WIDEST_READ.value


class Stored(NamedTuple):
    """Where a matrix lies. An address, and no tensor: descriptors that are kept keep no weights alive."""

    address: int
    rows: int
    width: int
    row_stride: int
    dtype: torch.dtype

    @classmethod
    def of(cls, matrix: Tensor) -> "Stored":
        rows, width = matrix.shape
        # A row apart, also where there is one row, or none, and its stride means nothing.
        return cls(matrix.data_ptr(), rows, width, max(matrix.stride(0), width), matrix.dtype)

    def row_address(self, row: int) -> int:
        return self.address + row * self.row_stride * self.dtype.itemsize

    @property
    def alignment(self) -> int:
        """Bytes of which the address of every row is a multiple, at most as many as a thread reads at once."""
        return gcd(self.address, self.row_stride * self.dtype.itemsize, WIDEST_READ)


class Partition(NamedTuple):
    """A partition, and where its weight and its class map lie."""

    layout: PartitionLayout
    weight: Stored
    class_map: Stored | None


class Table(NamedTuple):
    """A table, and its partitions with their places."""

    layout: TableLayout
    partitions: tuple[Partition, ...]


class Kernel(NamedTuple):
    """What is fixed when a kernel is compiled: entries that agree in it run in one launch."""

    K: int
    WIDTH: int
    TYPES: int
    ALIGN: int
    MULT: bool
    MAP: int
    GIVEN: int
    NARROW: bool


class Group(NamedTuple):
    """Consecutive entries of one `Kernel`.

    ``part``: which partition of a concatenation they are, None if of none; ``main``: which of their partitions has most
    rows; ``weights``: the weights of each table with entries here.
    """

    kernel: Kernel
    part: int | None
    main: int
    first: int
    size: int
    weights: tuple[tuple[int, ...], ...]

    def target(self, number: int) -> int | None:
        """Which of its K partitions is partition ``number`` of the table; None: it has no such."""
        if self.part is not None:
            return 0 if self.part == number else None
        return number if number < self.kernel.K else None

    def is_last(self, number: int) -> bool:
        """Whether nothing reads the rows of partition ``number`` once those of the other partitions are summed."""
        return not self.kernel.MULT or number == self.main


class Descriptors(NamedTuple):
    """Tables as the kernels see them.

    ``entries`` (entries, ENTRY_FIELDS) int64 on the device, group after group. ``first_feature`` (T + 1,) int32 on the
    device. ``parts``: first column, within the table's output, of each entry. Per partition number: ``entry_of``, the
    first entry of each table that has such a partition, or -1; ``keys``, how many keys it has in all tables;
    ``widths``, the most columns of its rows.
    """

    tables: tuple[TableLayout, ...]
    groups: list[Group]
    entries: Tensor
    first_feature: Tensor
    entry_of: list[tuple[int, ...]]
    keys: list[int]
    widths: list[int]
    parts: Tensor
    table_of_entry: list[int]
    num_features: int
    columns: int
    out_align: int  # floats at whose multiples every entry's columns begin
    dim: int | None  # of all tables, None where they differ


def magic(divisor: int, bits: int = 64) -> tuple[int, int]:
    """Returns (m, s) with x // divisor = (2x · m) >> (b + s) for 0 <= x < 2^(b - 1), as int64 has the bits of m.

    With s = ⌈log2 d⌉ and m = ⌈2^(b - 1 + s) / d⌉, m · d - 2^(b - 1 + s) < 2^s: the product exceeds x / d by less than
    1 / d.

    Args:
        divisor: d.
        bits: b, 32 or 64.

    Example:
        >>> m, s = magic(7)
        >>> (2 * 100 * (m % 2**64)) >> (64 + s)
        14
    """
    shift = (divisor - 1).bit_length()
    number = -(-(2 ** (bits - 1 + shift)) // divisor)
    return number - 2**64 if number >= 2**63 else number, shift


def on_device(numbers: Sequence[int | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose copy to a GPU the host does not wait for."""
    tensor = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _Entry(NamedTuple):
    kernel: Kernel
    part: int | None
    main: int
    table: int
    feature: int
    column: int  # of the output of all tables
    offset: int  # within the table's
    partitions: tuple[int, ...]


def describe(
    description: Description, weights: Sequence[Stored], class_maps: Sequence[Stored], device: torch.device
) -> Descriptors:
    """Returns the descriptors of tables whose weights lie on ``device``."""
    of_weights, of_maps, tables = iter(weights), iter(class_maps), []
    for layout in description.tables:
        class_map = next(of_maps) if layout.has_map else None
        tables.append(Table(layout, tuple(Partition(p, next(of_weights), class_map) for p in layout.partitions)))
    entries: list[_Entry] = []
    feature = column = 0
    for t, table in enumerate(tables):
        widths = [p.weight.width for p in table.partitions]
        rows = [p.weight.rows for p in table.partitions]
        split = table.layout.operation == "concat"
        for _ in range(table.layout.num_features):
            offset = 0
            for part, own in enumerate([(j,) for j in range(len(widths))] if split else [tuple(range(len(widths)))]):
                kernel = _kernel(table, [table.partitions[j] for j in own])
                of_part = part if split else None
                main = rows.index(max(rows)) if kernel.MULT else 0
                entries.append(_Entry(kernel, of_part, main, t, feature, column + offset, offset, own))
                offset += widths[own[0]]
            feature += 1
            column += offset
    # Parts of one concatenation in order, since their shares of the ids' gradient are added one after the other.
    entries.sort(key=lambda e: (e.part or 0, e.kernel, e.part is not None, e.main))
    groups: list[Group] = []
    first_weight = [0, *accumulate(len(table.partitions) for table in tables)]
    alike = groupby(enumerate(entries), key=lambda of: (of[1].kernel, of[1].part, of[1].main))
    for (kernel, of_part, main), members in alike:
        found = list(members)
        weights_of = dict.fromkeys(tuple(first_weight[e.table] + j for j in e.partitions) for _, e in found)
        groups.append(Group(kernel, of_part, main, found[0][0], len(found), tuple(weights_of)))
    return _written(tables, entries, groups, feature, column, device)


def _written(
    tables: list[Table],
    entries: list[_Entry],
    groups: list[Group],
    num_features: int,
    columns: int,
    device: torch.device,
) -> Descriptors:
    most = max(len(t.partitions) for t in tables)
    keys = [0] * most
    base: dict[tuple[int, int], int] = {}
    weight_index: dict[tuple[int, int], int] = {}
    for t, table in enumerate(tables):
        for j, partition in enumerate(table.partitions):
            base[t, j], weight_index[t, j] = keys[j], len(weight_index)
            keys[j] += partition.weight.rows
        keys = [k + 1 for k in keys]  # of ids without a row
    numbers: list[int] = []
    entry_of = [[-1] * len(tables) for _ in range(most)]
    group_of = [g for g, group in enumerate(groups) for _ in range(group.size)]
    for i, e in enumerate(entries):
        table = tables[e.table]
        per_row, stride, size, first_row = table.layout.code or (1, 0, 0, 0)
        own = [e.feature, e.column, *_ids(table.layout), group_of[i], table.layout.dim]
        own += [per_row, *magic(per_row), stride, *magic(max(stride, 1)), size, first_row, e.offset]
        num_ids = max(table.layout.num_ids, 1)
        own += [table.layout.hash_offset, num_ids, *magic(num_ids)]
        bits = 32 if e.kernel.NARROW else 64
        for j in e.partitions:
            if entry_of[j][e.table] < 0 or e.feature < entries[entry_of[j][e.table]].feature:
                entry_of[j][e.table] = i
            p, w, class_map = table.partitions[j]
            own += [w.address, w.rows, w.row_stride]
            divisor, modulus = max(p.divisor, 1), max(p.modulus, 1)
            own += [divisor, *magic(divisor, bits), modulus, *magic(modulus, bits), p.first_row]
            own += [0 if class_map is None else class_map.row_address(p.map_row)]
            own += [base[e.table, j], weight_index[e.table, j]]
        numbers += own + [0] * (fields.ENTRY_FIELDS.value - len(own))
    return Descriptors(
        tuple(table.layout for table in tables),
        groups,
        on_device(numbers, torch.int64, device),
        on_device([0, *accumulate(t.layout.num_features for t in tables)], torch.int32, device),
        [tuple(of) for of in entry_of],
        keys,
        [max(t.layout.widths[j] for t in tables if j < len(t.layout.widths)) for j in range(most)],
        on_device([e.offset for e in entries], torch.int64, device),
        [e.table for e in entries],
        num_features,
        columns,
        gcd(WIDEST_READ // 4, *(width for t in tables for width in t.layout.widths)),
        tables[0].layout.dim if len({t.layout.dim for t in tables}) == 1 else None,
    )


def _ids(table: TableLayout) -> tuple[int, int]:
    return (-(2**63), 2**63 - 1) if table.num_ids < 0 else (0, table.num_ids - 1)


def _kernel(table: Table, partitions: list[Partition]) -> Kernel:
    class_map = partitions[0].class_map
    return Kernel(
        K=len(partitions),
        WIDTH=partitions[0].weight.width,
        TYPES=sum(TYPES[p.weight.dtype] << (2 * i) for i, p in enumerate(partitions)),
        ALIGN=gcd(*(p.weight.alignment for p in partitions)),
        MULT=table.layout.operation == "mult" and len(partitions) > 1,
        MAP=0 if class_map is None else 1 if class_map.dtype == torch.int32 else 2,
        GIVEN=_given(table.layout),
        NARROW=_is_narrow(table.layout, partitions),
    )


def _given(table: TableLayout) -> int:
    if table.hash_seed is not None:
        return int(fields.HASHED.value)
    return int(fields.IDS.value if table.code is None else fields.CODES.value)


def _is_narrow(table: TableLayout, partitions: list[Partition]) -> bool:
    """Whether 32 bits hold all ids, divisors, moduli and rows. Codes are larger than ids."""
    numbers = [n for p in partitions for n in (p.layout.divisor, p.layout.modulus, p.layout.first_row, p.weight.rows)]
    return table.code is None and 0 <= table.num_ids < 2**31 and max(numbers) < 2**31
