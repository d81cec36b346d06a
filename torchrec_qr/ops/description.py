"""What every backend reads of the tables of a lookup besides their weights: plain numbers, made once per module."""

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_qr.id_hash import hash_offset, hashed_ids
from torchrec_qr.partitions.bound import closed_form_rows, mapped_rows

# What the kernels have, as csrc/lookup.h; PyTorch looks up the rest.
KERNEL_OPERATIONS = ("mult", "add", "concat")
MAX_PARTITIONS, MAX_WIDTH = 4, 1024


class PartitionLayout(NamedTuple):
    """Row of an id: ``(id // divisor) % modulus - first_row``, or ``class_map[id] - first_row`` if ``divisor`` is 0.

    ``modulus`` is 0 in a plain table alone, whose rows are the ids.
    """

    width: int
    divisor: int = 0
    modulus: int = 0
    first_row: int = 0
    map_row: int = 0

    def rows_of(self, ids: Tensor, class_map: Tensor | None) -> Tensor:
        """Returns (N,) int64: the rows that ids (N,) int64 select, in PyTorch."""
        if class_map is not None:
            rows = mapped_rows(ids, class_map[self.map_row])
        else:
            rows = closed_form_rows(ids, self.divisor, self.modulus) if self.modulus else ids
        return rows - self.first_row if self.first_row else rows


class CodeLayout(NamedTuple):
    """How an id follows from the code that travels in its place; see `torchrec_qr.distributed.layout`.

    row = code // per_row + first_row, rest = code % per_row; id = rest if ``stride`` is 0, else
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
        operation: ``mult``, ``add``, ``concat`` or ``path``; or ``plain``, K = 1, for which PyTorch has a kernel of its
            own.
        partitions: K of them, in order.
        num_features: consecutive features of the batch that are looked up here.
        num_ids: S; -1: any id at all, for closed forms.
        code: None if ids travel.
        path_hidden, path_activation: of the MLPs under ``path``; see `torchrec_qr.CompositionalEmbeddingBagConfig`.
        hash_seed: of the hash that brings any given ids into [0, S); None: ids are not hashed here. Ids that travel as
            codes were hashed before.
    """

    operation: str
    partitions: tuple[PartitionLayout, ...]
    num_features: int = 1
    num_ids: int = -1
    code: CodeLayout | None = None
    path_hidden: int | None = None
    path_activation: str = "relu"
    hash_seed: int | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each partition."""
        return tuple(p.width for p in self.partitions)

    @property
    def dim(self) -> int:
        """D: columns of the table's output per feature."""
        return sum(self.widths) if self.operation == "concat" else self.partitions[0].width

    @property
    def hash_offset(self) -> int:
        """The number that the hash adds to ids: see `torchrec_qr.id_hash`. 0 if ids are not hashed."""
        return 0 if self.hash_seed is None else hash_offset(self.hash_seed)

    @property
    def has_map(self) -> bool:
        """Whether an explicit map gives the rows."""
        return self.partitions[0].divisor == 0

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels have such a table."""
        return kernels_have(self.operation, self.widths)

    @property
    def is_served(self) -> bool:
        """True if the operators of served models have such a table. A plain one is a sum of one partition there."""
        return kernels_have("add" if self.operation == "plain" else self.operation, self.widths)

    def ids_of(self, ids: Tensor) -> Tensor:
        """Returns (N,) int64: the ids that codes stand for, the hashed ids, or what was given."""
        ids = ids.to(torch.int64)
        if self.hash_seed is not None:
            return hashed_ids(ids, self.hash_seed, self.num_ids)
        return ids if self.code is None else self.code.ids_of(ids)


def kernels_have(operation: str, widths: Sequence[int]) -> bool:
    """Returns whether the kernels have tables of an operation with partitions of these widths.

    Example:
        >>> kernels_have("mult", [64, 64]), kernels_have("path", [64, 4160])
        (True, False)
    """
    return operation in KERNEL_OPERATIONS and 0 < len(widths) <= MAX_PARTITIONS and max(widths) <= MAX_WIDTH


class Description:
    """The tables of one lookup, in order: all that is the same at every call.

    Backends keep what they derive from a description for as long as it lives, so that a module makes it once.

    Args:
        tables: the layout of each.
        names: the name of each, for errors.
        class_maps: (K, S) int32 or int64, one for each table with explicit partitions, on the device of the weights.
        features: the name of each feature, for errors, if the names are known.

    Example:
        >>> qr = TableLayout("mult", (PartitionLayout(8, 1, 25), PartitionLayout(8, 25, 4)), num_ids=100)
        >>> tables = Description([qr, qr], ["t_user", "t_item"])
        >>> tables.num_features, tables.columns, tables.has_kernels
        (2, 16, True)
    """

    def __init__(
        self,
        tables: Sequence[TableLayout],
        names: Sequence[str],
        class_maps: Sequence[Tensor] = (),
        features: Sequence[str] = (),
    ) -> None:
        if len(tables) != len(names):
            raise ValueError(f"names of tables {list(names)}; allowed: one per table, {len(tables)}")
        self.tables, self.names, self.class_maps = tuple(tables), tuple(names), list(class_maps)
        self.features = tuple(features)
        self.num_features = sum(t.num_features for t in tables)
        # D of each feature.
        self.dims = [t.dim for t in tables for _ in range(t.num_features)]
        self.columns = sum(self.dims)
        self.partitions = tuple(p for t in tables for p in t.partitions)
        self.mapped = tuple(t for t in tables if t.has_map)
        self.has_kernels = all(t.has_kernels for t in tables)
        # The same as a string, as an operator of `torch.library` takes it.
        self.text = json.dumps([self.tables, self.names, self.features])

    def maps_of_tables(self) -> list[Tensor | None]:
        """Returns the class map of each table; None for closed forms."""
        of_tables = iter(self.class_maps)
        return [next(of_tables) if t.has_map else None for t in self.tables]

    @cached_property
    def alone(self) -> "list[Description]":
        """The description of each table by itself."""
        of_tables = zip(self.tables, self.names, self.maps_of_tables(), strict=True)
        return [Description([t], [name], [] if m is None else [m]) for t, name, m in of_tables]

    def label(self, table: int, feature: int) -> str:
        """Returns the names of a table and of a feature of the lookup, for errors."""
        of_feature = f", feature {self.features[feature]!r}" if self.features else ""
        return f"table {self.names[table]!r}{of_feature}"


def described(text: str, class_maps: Sequence[Tensor] = ()) -> Description:
    """Returns the description that has ``text``.

    Example:
        >>> qr = TableLayout("mult", (PartitionLayout(8, 1, 25), PartitionLayout(8, 25, 4)), num_ids=100)
        >>> described(Description([qr], ["t"]).text).tables == (qr,)
        True
    """
    found = _described(text)
    return Description(found.tables, found.names, class_maps, found.features) if class_maps else found


@lru_cache(maxsize=1024)
def _described(text: str) -> Description:
    tables, names, features = json.loads(text)
    return Description([layout_of_fields(*fields) for fields in tables], names, features=features)


def layout_of_fields(operation: str, partitions: list[list[int]], *fields: Any) -> TableLayout:
    """Returns the layout whose fields JSON has kept."""
    table = TableLayout(operation, tuple(PartitionLayout(*p) for p in partitions), *fields)
    return table._replace(code=None if table.code is None else CodeLayout(*table.code))
