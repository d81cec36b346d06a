"""Thousands of tables on a thousand ranks, on a laptop."""

import gc
import math
import resource
import time

import pytest
from planner_models import collection, planner, sharders, zipf


def planning(tables: int, nodes: int) -> float:
    """CPU seconds: a busy machine is slow, not wrong."""
    configs, constraints = zipf(tables)
    module, made = collection(configs), planner(8 * nodes, 8, batch_size=512, constraints=constraints)
    gc.collect()
    start = time.process_time()
    placed = made.propose(module, sharders())
    plan = placed.sharding_plan().plan[""]
    spent = time.process_time() - start
    assert len(plan) == tables  # type: ignore[arg-type]
    assert max(placed.ranks.memory) <= min(placed.reserved)
    return spent


@pytest.mark.timeout(600)
def test_ten_thousand_tables_on_a_thousand_ranks_take_a_minute_and_four_gigabytes() -> None:
    assert planning(10_000, 128) <= 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= 4 * 2**20  # KiB


@pytest.mark.timeout(600)
def test_time_grows_no_faster_than_n_log_n_in_tables_and_ranks() -> None:
    planning(100, 1)
    by_tables = {n: planning(n, 16) for n in (500, 1000, 2000)}
    for few, many in ((500, 1000), (1000, 2000)):
        grown = many * math.log(many) / (few * math.log(few))
        assert by_tables[many] <= 1.4 * grown * by_tables[few], by_tables
    by_ranks = {nodes: planning(1000, nodes) for nodes in (16, 32, 64)}
    for few, many in ((16, 32), (32, 64)):
        grown = many * math.log(8 * many) / (few * math.log(8 * few))
        assert by_ranks[many] <= 1.4 * grown * by_ranks[few], by_ranks
