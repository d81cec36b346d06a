"""A plan takes time beside the work of its tables, and the search counts it."""

from dataclasses import replace

import pytest
from planner_models import collection, plain, planner, qr, sharders

from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named
from torchrec_qr.planner.fixed_costs import FixedCosts
from torchrec_qr.planner.tables import find_tables

BATCH = 1000
HARDWARE = replace(
    hardware_named("cpu"), sharding_ms=3.0, replication_ms=5.0, concat_factor=2.0, memory_gb_s=1.0, intra_gb_s=1.0
)


def ms(sharding_types: list[str], overlap_mib: float = 1e3) -> float:
    hardware = replace(HARDWARE, overlap_mib=overlap_mib)
    tables = find_tables(collection([qr("a", 1000, dim=64), qr("b", 1000, dim=64), plain("c", 9, dim=128)]), sharders())
    return FixedCosts(tables, hardware, BATCH, hardware.topology(2)).ms(sharding_types)


def test_sharding_types_and_reductions_count_once() -> None:
    concat = 2.0 * BATCH * (64 + 64 + 128) * 4 / 1e6  # bytes moved, at 1e6 bytes per ms
    assert ms(["table_wise"] * 3) == pytest.approx(3)
    assert ms(["data_parallel"] * 3) == pytest.approx(5)
    assert ms(["row_wise"] * 3) == pytest.approx(3 + 5)
    assert ms(["table_wise", "table_wise", "row_wise"]) == pytest.approx(3 + 3 + concat)  # "c" replicates nothing
    assert ms(["table_wise", "data_parallel", "data_parallel"]) == pytest.approx(3 + 5 + concat)


def test_messages_too_long_to_be_sent_and_received_at_once_take_their_time_again() -> None:
    # A rank owns half of the columns, and sends half of the outputs of those: its own are not sent.
    message = BATCH * (64 + 64 + 128) * 4 / 2
    again = 2 * message / 1e6  # forward and backward, at 1e6 bytes per ms
    assert ms(["table_wise"] * 3, overlap_mib=1.01 * message / 2**20) == pytest.approx(3)
    assert ms(["table_wise"] * 3, overlap_mib=0.99 * message / 2**20) == pytest.approx(3 + again)
    # Apart they are short enough.
    concat = 2.0 * BATCH * (64 + 64 + 128) * 4 / 1e6
    assert ms(["table_wise", "table_wise", "column_wise"], 0.99 * message / 2**20) == pytest.approx(6 + concat)


def test_the_search_gives_up_a_sharding_type_that_no_table_alone_would_leave() -> None:
    def types(replication_ms: float) -> set[str]:
        # Replicating each saves little of its work, and all together cost one reduction.
        hardware = replace(hardware_named("h100"), replication_ms=replication_ms)
        made = CompositionalEmbeddingShardingPlanner(hardware.topology(4), 8192, hardware=hardware)
        estimated = made.propose(collection([qr(f"t{i}", 100_000, 300) for i in range(8)]), sharders())
        return {p.option.sharding_type for p in estimated.tables}

    assert types(0.0) == {"data_parallel"}
    assert "data_parallel" not in types(50.0)


def test_one_rank_a_host_makes_hosted_types_pointless() -> None:
    estimated = planner(4, 1).propose(collection([qr("t", 10_000_000)]), sharders())
    offered = {o.sharding_type for o in estimated.tables[0].choices}
    assert offered == {"table_wise", "column_wise", "row_wise", "data_parallel"}
