"""Tables of a cell, such that every method has the same parameters in total."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from benchmarks.quality.cells import Cell
from torchrec_qr import ChineseRemainder, MixedRadix, QuotientRemainder
from torchrec_qr.cli.schema import TableSpec, load
from torchrec_qr.configs import stored_shapes

DIM = 16
_PATH_HIDDEN = {"path_16": 16, "path_64": 64}
_SIZES: dict[str, tuple[Any, int]] = {
    "mixed_radix_3": (MixedRadix, 3),
    "chinese_remainder_2": (ChineseRemainder, 2),
    "chinese_remainder_3": (ChineseRemainder, 3),
}
# A share of the target total; a step of a table's number of collisions can be larger than what is left.
TOLERANCE = 0.02
# A table that takes up what rounding left over: to at most so many times its share.
_LARGEST_STEP = 1.8


class ImpossibleCellError(ValueError):
    """No tables of this method have so few parameters, or the method has no meaning for the data."""


class Sized(NamedTuple):
    """Keys of a table beside its name, S and D, and its parameters."""

    keys: Mapping[str, Any]
    parameters: int


def tables_of(cell: Cell, rows: Mapping[str, int], natural: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns the ``tables:`` section of a cell: one table per feature.

    Every table above the threshold gets the same share 1/r of its rows, r such that the total is that of the cell's
    compression: the method's own integers, such as the number of collisions, are the fewest that keep within it. A
    table that cannot be so small takes the least that its method has; one that its method would make larger stays
    whole. What rounding leaves over goes to the largest tables that have use for it.

    Args:
        cell: method and compression.
        rows: S of each feature.
        natural: file of the explicit partitions of the features that have them.

    Raises:
        ImpossibleCellError: says why.
    """
    sized = _natural(cell, rows, natural or {}) if cell.method == "natural" else _sized(cell, rows)
    return [
        {"name": feature, "num_embeddings": rows[feature], "embedding_dim": DIM, **table.keys}
        for feature, table in sized.items()
    ]


def parameters_of(table: Mapping[str, Any]) -> int:
    """Returns Σ_j |P_j| · columns of partition j of an entry of ``tables:``."""
    shapes = stored_shapes(load(TableSpec, dict(table)).build())
    return sum(shape.rows * shape.columns for shape in shapes)


def _sized(cell: Cell, rows: Mapping[str, int]) -> dict[str, Sized]:
    whole = {feature: _whole(s) for feature, s in rows.items()}
    if cell.method == "full":
        return whole
    assert cell.compression is not None
    target = sum(t.parameters for t in whole.values()) // cell.compression
    large = {feature: s for feature, s in rows.items() if s > cell.threshold}

    def at(ratio: float) -> dict[str, Sized]:
        return {**whole, **{feature: _compressed(cell.method, cell.grouping, s, ratio) for feature, s in large.items()}}

    low, high = 1.0, float(max(rows.values()) * 4)
    if _total(at(high)) > target:
        least = sum(whole[f].parameters for f in rows) / _total(at(high))
        raise ImpossibleCellError(
            f"{cell.method} with tables of up to {cell.threshold} rows whole ends at {least:.1f} times fewer parameters"
        )
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _total(at(middle)) <= target else (middle, high)
    found = at(high)
    _fill(cell, found, large, high, target)
    short = 1 - _total(found) / target
    if short > TOLERANCE:
        raise ImpossibleCellError(f"{cell.method}: the nearest total is {short:.1%} below the target")
    return found


def _fill(cell: Cell, found: dict[str, Sized], large: Mapping[str, int], ratio: float, target: int) -> None:
    for feature, s in sorted(large.items(), key=lambda item: -item[1]):
        left = target - _total(found)
        if left <= 0:
            return
        before, low, high = found[feature].parameters, max(1.0, ratio / _LARGEST_STEP), ratio
        while high / low > 1.0001:
            middle = math.sqrt(low * high)
            fits = _compressed(cell.method, cell.grouping, s, middle).parameters <= before + left
            low, high = (low, middle) if fits else (middle, high)
        found[feature] = _compressed(cell.method, cell.grouping, s, high)


def _total(tables: Mapping[str, Sized]) -> int:
    return sum(table.parameters for table in tables.values())


def _whole(s: int) -> Sized:
    return Sized({}, s * DIM)


@lru_cache(maxsize=1 << 16)
def _compressed(method: str, grouping: str, s: int, ratio: float) -> Sized:
    keys = _keys(method, grouping, s, max(1, int(s / ratio)))
    table = Sized(keys, parameters_of({"name": "t", "num_embeddings": s, "embedding_dim": DIM, **keys}))
    return table if table.parameters < s * DIM else _whole(s)


def _keys(method: str, grouping: str, s: int, rows: int) -> dict[str, Any]:
    """Returns the keys of a table of at most ``rows`` · D parameters, or the fewest."""
    if method == "hash":
        return {"partitions": {"kind": "hash", "rows": rows}}
    if method in _SIZES:
        cls, count = _SIZES[method]
        least = cls(balanced=True, num_partitions=count).bind(s).num_rows
        sizes = cls(rows=max(rows, least), num_partitions=count).bind(s).sizes
        return {"partitions": {"kind": cls.kind, "sizes": list(sizes)}}
    if method in _PATH_HIDDEN:
        return _path_keys(s, rows, _PATH_HIDDEN[method])
    if method == "concat":
        rows *= 2  # of half the width
    least = QuotientRemainder(balanced=True).bind(s).num_rows
    m = QuotientRemainder(rows=max(rows, least)).bind(s).sizes[1]
    partitions = {"kind": "quotient_remainder", "num_collisions": m, "grouping": grouping}
    operation = method if method in ("add", "concat") else "mult"
    return {"partitions": partitions, "operation": operation}


def _path_keys(s: int, rows: int, hidden: int) -> dict[str, Any]:
    """As `_keys`: m collisions cost ⌈S/m⌉ rows and m MLPs, of which each is ``cost`` rows' worth."""
    cost = (2 * DIM * hidden + DIM + hidden) / DIM
    best = max(1, round(math.sqrt(s / cost)))
    m = next((m for m in range(2, best) if -(-s // m) + m * cost <= rows), best)
    return {
        "partitions": {"kind": "quotient_remainder", "num_collisions": m},
        "operation": "path",
        "path_hidden": hidden,
    }


def _natural(cell: Cell, rows: Mapping[str, int], natural: Mapping[str, str]) -> dict[str, Sized]:
    if not natural:
        raise ImpossibleCellError("the data has no classes of its own to part ids by")
    keys = {feature: {"partitions": {"kind": "explicit", "file": file}} for feature, file in natural.items()}
    return {feature: Sized(keys.get(feature, {}), 0) for feature in rows}
