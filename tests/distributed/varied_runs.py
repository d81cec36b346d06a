"""Tables in all their variety, by hand-written plans, which train on whatever ranks there are."""

from typing import Any

from pairwise import pairwise
from parity_model import DENSE, Run, TableCase, Trained, train
from placements import BASIC_SHARDINGS, COLUMN_SPLIT, SHARDINGS

FACTORS: dict[str, tuple[Any, ...]] = {
    "sharding": SHARDINGS,
    "optimizer": ("sgd", "adagrad", "rowwise_adagrad", "adam", *DENSE),
    "operation": ("mult", "add", "concat", "path"),
    "out_of_range": ("error", "clamp", "wrap", "unchecked"),
    "data_type": ("FP32", "FP16", "BF16"),
    "kind": (("strided", 2), ("explicit", 2), ("hash", 1), ("mixed_radix", 3)),
    "pooling": ("sum", "mean"),
    "weighted": (False, True),
}
SEQUENCE_FACTORS = {name: values for name, values in FACTORS.items() if name not in ("pooling", "weighted")} | {
    "sharding": BASIC_SHARDINGS,
    "index_dedup": (False, True),
}


def possible(case: dict[str, Any]) -> bool:
    """A path's MLPs need all columns: refused by name under a column split."""
    return not (case.get("operation") == "path" and case.get("sharding") in COLUMN_SPLIT)


def tables_of(cases: list[dict[str, Any]], *by: str, **fields: Any) -> dict[tuple[Any, ...], tuple[TableCase, ...]]:
    """A table for each case, together with those that share the values of ``by``, which are of collections."""
    tables: dict[tuple[Any, ...], list[TableCase]] = {}
    for case in cases:
        (kind, k), own = case["kind"], {n: v for n, v in case.items() if n not in ("kind", *by)}
        table = TableCase("_".join([f"{kind}{k}", *map(str, own.values())]), kind, k=k, **own, **fields)
        of_collection = tables.setdefault(tuple(case.get(n, False) for n in by), [])
        if table not in of_collection:
            of_collection.append(table)
    return {key: tuple(tables[key]) for key in sorted(tables)}


def runs_of(factors: dict[str, tuple[Any, ...]], pooled: bool) -> dict[str, Run]:
    """Every pair of values of two factors, in one collection for the tables that can be of one."""
    runs = {}
    by = ("optimizer", "weighted", "index_dedup")
    for (optimizer, weighted, dedup), tables in tables_of(pairwise(factors, possible), *by, plan="hand").items():
        words = ["bags" if pooled else "sequences", optimizer, *["weighted"] * weighted, *["dedup"] * dedup]
        runs["-".join(words)] = Run(tables, optimizer, weighted, pooled, wild_ids=True, index_dedup=dedup)
    return runs


def train_all(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, Trained]:
    """Runs on a rank."""
    return {name: train(rank, world_size, run) for name, run in runs.items()}
