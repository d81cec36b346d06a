"""Ranks that own no table take part in every collective, in the order of the others: with NCCL they would hang."""

import pytest
from parity_model import Run, TableCase
from parity_reference import Exact
from poison_compare import assert_same, assert_same_order
from poison_group import register
from poison_tables import train_all_journaled
from ranks import run_ranks

# The first rank, or the first node, owns all tables of these types. Every rank owns a part of the others.
OWNED_BY_FIRST = ("table_wise", "table_row_wise")
POOLED = (
    *(
        TableCase(f"{s}_{op}", "strided", s, operation=op, plan="hand")
        for s in OWNED_BY_FIRST
        for op in ("mult", "add")
    ),
    TableCase("map", "explicit", "table_row_wise", pooling="mean", plan="hand"),
    TableCase("path", "strided", "table_row_wise", operation="path", plan="hand"),
)
ON_ALL = (
    TableCase("row_wise", "strided", "row_wise", plan="hand"),
    TableCase("data_parallel", "strided", "data_parallel", plan="hand"),
)
SEQUENCES = (TableCase("table_wise", "strided", "table_wise", plan="hand"), *ON_ALL)
RUNS = {
    "one type": Run(POOLED[:2]),
    "nodes": Run(POOLED[2:], optimizer="adagrad"),
    "both": Run(POOLED, optimizer="adam"),
    "all": Run(
        (*POOLED, *ON_ALL, TableCase("grid", "strided", "grid_shard", plan="hand")), optimizer="adam", weighted=True
    ),
    "dense": Run((*POOLED, *ON_ALL), optimizer="dense_sgd"),
    "sequences": Run(SEQUENCES, pooled=False, optimizer="adam"),
    "unique ids": Run(SEQUENCES, pooled=False, index_dedup=True),
}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_without_tables_keep_step(world_size: int) -> None:
    plain, poisoned = (
        run_ranks(train_all_journaled, world_size, RUNS, {"on_first": True}, local_world_size=2, backend=b)
        for b in ("gloo", register)
    )
    for name, run in RUNS.items():
        outcomes = [rank[name] for rank in poisoned]
        exact = Exact(run, outcomes)
        for table in run.tables:
            exact.assert_close(table)
            for found, expected in zip(outcomes, plain, strict=True):
                assert_same(found, expected[name], run, table)
        assert_same_order([outcome.issued for outcome in outcomes])
        assert [outcome.violations for outcome in outcomes] == [[]] * world_size
        if name == "one type":
            held = [sum(v.size for pieces in o.state.values() for _, _, v in pieces) for o in outcomes]
            assert held[0] > 0
            assert held[1:] == [0] * (world_size - 1), "the other ranks own a part after all"
