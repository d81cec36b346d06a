"""Tables of which each node has a copy: they train as the reference does, on poison as on gloo, and copies stay equal.

`assembled` compares bit for bit what the ranks of both nodes hold. On step 1 the second node has no ids at all, and on
step 2 no node has ids of one table.
"""

import pytest
from parity_model import OPTIMIZERS, Run, TableCase
from parity_reference import Exact
from poison_compare import assert_same, assert_same_order
from poison_group import register
from poison_tables import train_journaled
from ranks import run_ranks

TW, CW, RW = "table_wise_per_node", "column_wise_per_node", "row_wise_per_node"
POOLED = (
    TableCase("tw", "strided", TW, plan="hand"),
    TableCase("tw_path", "explicit", TW, operation="path", plan="hand"),
    TableCase("tw_half", "hash", TW, data_type="FP16", k=1, plan="hand"),
    TableCase("cw", "chinese_remainder", CW, k=3, operation="concat", features=("f0", "f1"), plan="hand"),
    TableCase("cw_mean", "adjacent", CW, pooling="mean", out_of_range="wrap", plan="hand"),
    TableCase("rw", "mixed_radix", RW, k=3, operation="add", features=("f1", "f2"), plan="hand"),
    TableCase("rw_map", "explicit", RW, pooling="mean", out_of_range="clamp", plan="hand"),
    TableCase("rw_path", "strided", RW, operation="path", plan="hand"),
    TableCase("rw_tiny", "tiny", RW, plan="hand"),
)
# Tables of the other kinds in the same collection.
OF_ALL = tuple(TableCase(s, "strided", s, plan="hand") for s in ("table_wise", "row_wise", "data_parallel"))
SEQUENCES = (
    TableCase("tw", "strided", TW, features=("f0", "f1"), plan="hand"),
    TableCase("rw", "explicit", RW, operation="add", plan="hand"),
    *OF_ALL,
)
RUNS = {
    **{f"bags of {optimizer}": Run((*POOLED, *OF_ALL), optimizer, weighted=True) for optimizer in OPTIMIZERS},
    "sequences": Run(SEQUENCES, "adam", pooled=False),
    "unique ids": Run(SEQUENCES, "adagrad", pooled=False, index_dedup=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_copies_train_as_the_reference_on_poison_as_on_gloo(name: str) -> None:
    run = RUNS[name]
    plain, poisoned = (
        run_ranks(train_journaled, 4, run, local_world_size=2, backend=backend) for backend in ("gloo", register)
    )
    exact = Exact(run, poisoned)
    for table in run.tables:
        exact.assert_close(table)
        for found, expected in zip(poisoned, plain, strict=True):
            assert_same(found, expected, run, table)
    assert_same_order([rank.issued for rank in poisoned])
    assert [rank.violations for rank in poisoned] == [[]] * 4
