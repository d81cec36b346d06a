"""Thousands of tables on a thousand ranks, on a laptop. How long that takes: `benchmarks/planner_scale.py`."""

import resource

import pytest
from planner_models import collection, mlperf, planner, sharders

from benchmarks.planner_scale import zipf
from torchrec_qr.planner.enumerators import Enumerator
from torchrec_qr.planner.tables import find_tables


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_tables_on_a_thousand_ranks_take_less_than_four_gigabytes() -> None:
    configs, constraints = zipf(10_000)
    estimated = planner(1024, 8, batch_size=512, constraints=constraints).propose(collection(configs), sharders())
    plan = estimated.sharding_plan().plan[""]
    assert set(plan) == {c.name for c in configs}  # type: ignore[call-overload]
    assert max(estimated.ranks.memory) <= min(estimated.reserved)
    assert estimated.ranks.balance <= 1.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= 4 * 2**20  # KiB


@pytest.mark.slow
def test_a_few_tables_on_a_thousand_ranks_are_planned_as_well_as_for_ranks_of_more_memory() -> None:
    tables, constraints = mlperf()
    arguments = {"batch_size": 8192, "constraints": constraints}
    h100, h200 = planner(1024, 8, "h100", **arguments), planner(1024, 8, "h200", **arguments)
    module = collection(tables)
    roomy = h200.plan(module, sharders())
    assert max(h100.estimate(roomy, module, sharders()).memory) <= 0.85 * 80 * 2**30  # it fits an H100 too
    assert h100.propose(module, sharders()).step_ms <= 1.1 * h100.step_ms(roomy, module, sharders())


def test_a_table_has_no_more_to_look_at_on_a_thousand_ranks_than_on_a_hundred() -> None:
    configs, constraints = zipf(200)

    def costs(nodes: int) -> int:
        """Returns how many estimates are made: one for each distinct shard of all options."""
        made = planner(8 * nodes, 8, batch_size=512, constraints=constraints)
        enumerator = Enumerator(made._topology, made._estimator(made._topology), 68 * 2**30)
        tables = find_tables(collection(configs), sharders(), constraints)
        return sum(len({*b.shards}) for t in tables for o in enumerator.options(t) for b in {*o.blocks})

    assert costs(128) <= costs(16)
