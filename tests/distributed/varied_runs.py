"""Tables in all their variety, by hand-written plans, which train on whatever ranks there are."""

from typing import Any

from pairwise import pairwise
from parity_model import DENSE, Run, TableCase, Trained, train
from placements import BASIC_SHARDINGS, SHARDINGS
from test_parity_pooled import possible

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


def runs_of(factors: dict[str, tuple[Any, ...]], pooled: bool) -> dict[str, Run]:
    """Every pair of values of two factors, in one collection for the tables that can be of one."""
    tables: dict[tuple[str, bool, bool], list[TableCase]] = {}
    for case in pairwise(factors, possible):
        kind, k = case["kind"]
        named = ("sharding", "operation", "data_type", "out_of_range", "pooling")
        fields = {name: case[name] for name in named if name in case}
        name = "_".join([case["sharding"], f"{kind}{k}", *(str(v) for n, v in fields.items() if n != "sharding")])
        table = TableCase(name=name, kind=kind, k=k, plan="hand", **fields)
        key = case["optimizer"], case.get("weighted", False), case.get("index_dedup", False)
        if table not in tables.setdefault(key, []):
            tables[key].append(table)
    return {
        "-".join(
            ["bags" if pooled else "sequences", optimizer, *["weighted"] * weighted, *["dedup"] * index_dedup]
        ): Run(tuple(of_run), optimizer, weighted, pooled, wild_ids=True, index_dedup=index_dedup)
        for (optimizer, weighted, index_dedup), of_run in sorted(tables.items())
    }


def train_all(rank: int, world_size: int, runs: dict[str, Run]) -> dict[str, Trained]:
    """Runs on a rank."""
    return {name: train(rank, world_size, run) for name, run in runs.items()}
