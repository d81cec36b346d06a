"""What the study trains: cells, each a method at a compression with one factor away from the default."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Method = Literal[
    "full",
    "hash",
    "mult",
    "add",
    "concat",
    "mixed_radix_3",
    "chinese_remainder_2",
    "chinese_remainder_3",
    "path_16",
    "path_64",
    "feature_generation",
    "natural",
    "pool_first",
]
Order = Literal["frequency", "first_appearance", "random"]

GENERATED = ("generator_1e5", "generator_1e6", "generator_1e7")
DATA = ("criteo", *GENERATED, "generator_multi_hot", "movielens")
COMPRESSIONS = (4, 16, 60, 250)
# Tables of at most so many rows stay whole. At 250 what lies below 200 would alone fill the budget.
THRESHOLD, THRESHOLD_AT_250 = 200, 20
# Factors of the learning rate among which the search takes the one that validates best, alike for every method.
RATES = (1.0, 2.0, 4.0, 8.0, 16.0)
_NUMBERS: dict[str, Callable[[str], Any]] = {"threshold": int, "epochs": int, "lr_factor": float}
# How many cells of a data set the statements need most.
_LEADING = {"criteo": 20, "generator_multi_hot": 4, "generator_1e7": 3, "movielens": 8}


@dataclass(frozen=True)
class Cell:
    """One combination that is trained with several seeds; the defaults are the library's.

    Args:
        data: of `DATA`.
        method: how ids become embeddings.
        compression: logical / physical parameters of all tables together; None: as the method has it.
        grouping: of a quotient-remainder.
        init: the library's modes, or ``dlrm``: U[√(1/S), 1], as the reference draws.
        order: of ids.
        optimizer: of tables; under ``amsgrad`` of all parameters, as in the paper.
        threshold: rows up to which a table stays whole.
        lr_factor: multiplies the tables' learning rate.
        epochs: most epochs, where not the data set's.
        layers: ``paper``: of the dense part, as wide as the paper's.
    """

    data: str
    method: Method
    compression: int | None = None
    grouping: Literal["strided", "adjacent"] = "strided"
    init: Literal["unit", "identity", "balanced", "dlrm"] = "unit"
    order: Order = "frequency"
    optimizer: Literal["adagrad", "rowwise_adagrad", "amsgrad"] = "adagrad"
    threshold: int = THRESHOLD
    lr_factor: float = 1.0
    epochs: int | None = None
    layers: Literal["paper"] | None = None

    @property
    def key(self) -> str:
        """Data, method, compression, and what is not as by default: a file's name.

        Example:
            >>> Cell("criteo", "mult", 4, order="random").key
            'criteo.mult.4x.order=random'
        """
        plain = asdict(Cell(self.data, self.method, self.compression))
        differing = [f"{name}={value}" for name, value in asdict(self).items() if value != plain[name]]
        size = [] if self.compression is None else [f"{self.compression}x"]
        return ".".join([self.data, self.method, *size, *differing])

    @classmethod
    def of_key(cls, key: str) -> "Cell":
        """Returns the cell of a `key`.

        Example:
            >>> Cell.of_key("criteo.mult.4x.lr_factor=8.0.order=random")
            Cell(data='criteo', method='mult', compression=4, ... order='random', ... lr_factor=8.0, ...)
        """
        data, method, *parts = re.split(r"\.(?=[a-z]|\d+x)", key)
        fields: dict[str, Any] = {"data": data, "method": method}
        for part in parts:
            name, _, value = part.partition("=")
            if value:
                fields[name] = _NUMBERS.get(name, str)(value)
            else:
                fields["compression"] = int(part.removesuffix("x"))
        return cls(**fields)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Cell":
        """Returns the cell of a result's ``cell``."""
        return cls(**fields)


def at_rates(cell: Cell) -> list[Cell]:
    """Returns a cell at all learning rates of the search."""
    return [replace(cell, lr_factor=factor) for factor in RATES]


def cells(data: str) -> list[Cell]:
    """Returns the cells of a data set, what the statements need first."""
    match data:
        case "criteo":
            return _criteo()
        case "movielens":
            return _movielens()
        case "generator_multi_hot":
            return _multi_hot(data)
    return _generated(data)


def in_order(names: Sequence[str]) -> list[Cell]:
    """Returns the cells of data sets: the leading ones of each, then the rest."""
    lists = [(cells(name), _LEADING.get(name, 10)) for name in names]
    return [c for found, n in lists for c in found[:n]] + [c for found, n in lists for c in found[n:]]


def quick(data: str) -> list[Cell]:
    """Returns the few cells of ``--quick``: full, hashing and multiplication at two compressions."""
    low, high = {"movielens": (60, 250), "generator_multi_hot": (4, 16)}.get(data, (4, 60))
    return [Cell(data, "full"), *(Cell(data, m, c) for c in (low, high) for m in ("hash", "mult"))]


def _criteo() -> list[Cell]:
    full, hashed, mult = Cell("criteo", "full"), Cell("criteo", "hash", 4), Cell("criteo", "mult", 4)
    first, amsgrad = {"order": "first_appearance"}, {"optimizer": "amsgrad"}
    found = [full, hashed, mult, *_inits(mult)]
    found += [replace(cell, compression=60) for cell in (mult, hashed)]
    found += [replace(mult, grouping="adjacent"), *_all([hashed, mult, replace(mult, grouping="adjacent")], **first)]
    found += _all([mult, full, hashed], **amsgrad)
    found += _all([mult, replace(mult, grouping="adjacent"), hashed], order="random")
    found += [Cell("criteo", "path_16", 4), Cell("criteo", "path_64", 4)]
    found += _methods("criteo", 4)
    found += [*_methods("criteo", 60, paths=False), *_at("criteo", 16), *_at("criteo", 250)]
    found += [replace(mult, compression=16, threshold=t) for t in (1, 20, 2000)]
    found += _all([full, hashed, mult], optimizer="rowwise_adagrad")
    found += _inits(replace(mult, grouping="adjacent"))
    found += [replace(Cell("criteo", "add", 4), **amsgrad), replace(Cell("criteo", "add", 4), init="balanced")]  # type: ignore[arg-type]
    found += [replace(cell, layers="paper") for cell in (full, hashed, mult)]
    found += [replace(cell, epochs=2) for cell in (full, mult, replace(mult, init="dlrm"))]
    found += [Cell("criteo", path, c) for c in (16, 60) for path in ("path_16", "path_64")]
    found += [replace(cell, lr_factor=0.5) for cell in (full, hashed, mult)]
    searched = [full, *(cell for size in (4, 16, 60) for cell in _searched("criteo", size))]
    searched += _all([full, hashed, mult], **amsgrad)
    return _with_threshold([*found, *(cell for each in searched for cell in at_rates(each))])


def _generated(data: str) -> list[Cell]:
    found = [Cell(data, "full")]
    for compression in (60, 4, 16, 250):
        found += _at(data, compression)
    mult = Cell(data, "mult", 60)
    if data == "generator_1e6":
        found += [*_inits(mult), replace(mult, grouping="adjacent")]
        found += _all([mult, Cell(data, "hash", 60), replace(mult, grouping="adjacent")], order="random")
        found += _all([mult, Cell(data, "hash", 60)], optimizer="amsgrad")
        found += _methods(data, 60)
        found += [cell for each in (found[0], *_at(data, 60)) for cell in at_rates(each)]
    return _with_threshold(found)


def _multi_hot(data: str) -> list[Cell]:
    found = [Cell(data, "full")]
    for compression in (16, 4):
        found += [
            Cell(data, "mult", compression),
            Cell(data, "pool_first", compression),
            Cell(data, "hash", compression),
        ]
    return found


def _movielens() -> list[Cell]:
    found = [Cell("movielens", "full"), Cell("movielens", "natural")]
    for compression in (60, 250, 16, 4):
        found += _at("movielens", compression)
    return _with_threshold([*found, *_methods("movielens", 60)])


def _at(data: str, compression: int) -> list[Cell]:
    return [Cell(data, "hash", compression), Cell(data, "mult", compression), Cell(data, "mixed_radix_3", compression)]


def _methods(data: str, compression: int, paths: bool = True) -> list[Cell]:
    names: list[Method] = ["add", "concat", "mixed_radix_3", "chinese_remainder_2", "chinese_remainder_3"]
    names += ["feature_generation", *(["path_16", "path_64"] if paths else [])]  # type: ignore[list-item]
    return [Cell(data, name, compression) for name in names]


def _searched(data: str, compression: int) -> list[Cell]:
    hashed, mult, mixed = _at(data, compression)
    return [hashed, mult, mixed, *_all([mult, mixed], init="identity"), *_all([mult, mixed], init="balanced")]


def _inits(mult: Cell) -> list[Cell]:
    return [replace(mult, init="identity"), replace(mult, init="balanced"), replace(mult, init="dlrm")]


def _all(cells: list[Cell], **fields: Any) -> list[Cell]:
    return [replace(cell, **fields) for cell in cells]


def _with_threshold(cells: list[Cell]) -> list[Cell]:
    found = [replace(cell, threshold=THRESHOLD_AT_250) if cell.compression == 250 else cell for cell in cells]
    return list(dict.fromkeys(found))
