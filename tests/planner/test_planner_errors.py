"""Plans that cannot be: the error names why, and each suggestion in it does help."""

import inspect
import re

import pytest
import torch
from planner_models import collection, mlperf, plain, planner, qr, sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType

from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named
from torchrec_qr.planner.error_kinds import NOT_IN_PLAN


def message_of(tables: list[object], made: CompositionalEmbeddingShardingPlanner) -> str:
    with pytest.raises(PlannerError) as caught:
        made.plan(collection(tables), sharders())  # type: ignore[arg-type]
    assert caught.value.error_type == PlannerErrorType.INSUFFICIENT_STORAGE
    return str(caught.value)


def test_a_table_that_fits_nowhere_is_named_with_what_would_help() -> None:
    only = {"big": ParameterConstraints(sharding_types=["table_wise"])}
    tables = [plain("big", 40_000_000), plain("small", 1000)]
    message = message_of(tables, planner(4, 2, memory_gib=16, batch_size=512, constraints=only))
    first, *suggestions = message.splitlines()
    # Values and Adagrad's state: 2 · 40e6 · 512 bytes; 85 % of 16 GiB are for tables.
    assert first.startswith("no plan fits: table 'big' needs 38.15 GiB of memory on a rank, and the ranks have left ")
    assert "13.60 GiB (ranks 0-3)" in first
    assert suggestions[0] == "what would help, cheapest first:"
    assert suggestions[1] == "  1. another sharding type: column_wise for table 'big'"
    found = re.fullmatch(
        r"  2\. more compression: QuotientRemainder\(num_collisions=(\d+)\) for table 'big', which is "
        r"40,000,000 ids in 40,000,000 rows \(1\.0×\) now",
        suggestions[2],
    )
    assert found is not None
    assert len(suggestions) == 3  # more ranks help no table that lies on one
    collisions = int(found[1])
    same = planner(4, 2, memory_gib=16, batch_size=512, constraints=only)
    assert len(same.plan(collection([qr("big", 40_000_000, collisions), tables[1]]), sharders()).plan[""]) == 2  # type: ignore[arg-type]
    message_of([qr("big", 40_000_000, collisions - 1), tables[1]], same)
    free = planner(4, 2, memory_gib=16, batch_size=512, constraints={})
    assert len(free.plan(collection(tables), sharders()).plan[""]) == 2  # type: ignore[arg-type]


def test_the_number_of_ranks_said_to_fit_does_and_one_node_less_does_not() -> None:
    tables, constraints = mlperf()
    message = message_of(tables, planner(8, 8, memory_gib=4, batch_size=512, constraints=constraints))
    found = re.search(r"more ranks: (\d+) \((\d+)x8\), now 8", message)
    assert found is not None
    ranks = int(found[1])
    assert planner(ranks, 8, memory_gib=4, batch_size=512, constraints=constraints).fits(collection(tables), sharders())
    assert not planner(ranks - 8, 8, memory_gib=4, batch_size=512, constraints=constraints).fits(
        collection(tables), sharders()
    )
    rows = re.search(r"more compression: (?:at most ([\d,]+) rows|QuotientRemainder)", message)
    assert rows is not None


@pytest.mark.parametrize(
    ("sharding_types", "said"),
    [
        (["grid"], "table 't': no sharding type is left; its sharder offers table_wise"),
        (["data_parallel"], "table 't': no sharding type is left; .* on ranks 0"),
    ],
)
def test_constraints_that_leave_nothing_are_named(sharding_types: list[str], said: str) -> None:
    constraints = {"t": ParameterConstraints(sharding_types=sharding_types)}
    with pytest.raises(PlannerError, match=said):
        planner(2, constraints=constraints, ranks={"t": [0]}).plan(collection([qr("t", 1000)]), sharders())


def test_models_without_tables_and_constraints_without_a_table_are_named() -> None:
    with pytest.raises(PlannerError, match=r"no tables: no module of the Linear has a sharder and a table"):
        planner(2).plan(torch.nn.Linear(2, 2), sharders())
    constraints = {"user": ParameterConstraints()}
    with pytest.raises(PlannerError, match=r"constraints of tables 'user', which the model does not have; .* 't_user'"):
        planner(2, constraints=constraints).plan(collection([qr("t_user", 1000)]), sharders())
    with pytest.raises(PlannerError, match=r"constraints of tables 'user'"):
        planner(2, ranks={"user": [0]}).plan(collection([qr("t_user", 1000)]), sharders())


def test_clusters_that_are_none_are_named() -> None:
    h100 = hardware_named("h100")
    with pytest.raises(ValueError, match="world_size=0; allowed: at least 1 rank"):
        h100.topology(0)
    with pytest.raises(ValueError, match="local_world_size=3; allowed: a divisor of world_size=8"):
        h100.topology(8, 3)
    with pytest.raises(ValueError, match="memory_gib=-1; allowed: above 0"):
        h100.topology(8, memory_gib=-1)
    with pytest.raises(ValueError, match="device 'h300' is unknown; allowed: cpu, a100, h100, h200"):
        hardware_named("h300")
    with pytest.raises(ValueError, match=r"table 't': ranks=\[8\]; allowed: some of 0\.\.7"):
        planner(8, ranks={"t": [8]})
    with pytest.raises(ValueError, match="batch_size=0; allowed: at least 1"):
        planner(8, batch_size=0)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("enumerator", "constraints narrow"),
        ("proposer", "`constraints` and `ranks` narrow"),
        ("partitioner", "`ranks` narrows"),
        ("performance_model", "`topology` and `hardware`"),
        ("stats", "`propose` returns all estimates"),
        ("callbacks", "change the plan"),
        ("timeout_seconds", "a number of trials"),
        ("plan_loader", "pass a stored plan to DistributedModelParallel"),
    ],
)
def test_parts_of_torchrecs_planner_are_refused_with_what_to_use_instead(argument: str, said: str) -> None:
    planner(2, **{argument: None})
    with pytest.raises(ValueError, match=rf"{argument}=7; allowed: None; .*{said}"):
        planner(2, **{argument: 7})
    # Every argument of TorchRec's planner is either refused or taken.
    taken = {"self", "topology", "batch_size", "storage_reservation", "constraints", "debug"}
    of_torchrec = set(inspect.signature(EmbeddingShardingPlanner.__init__).parameters) - taken
    for name in of_torchrec:
        planner(2, **{name: None})
    with pytest.raises(TypeError, match="has no argument 'propser'"):
        planner(2, propser=None)


def test_debug_logs_where_tables_lie_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        planner(2).plan(collection([qr("t", 1000)]), sharders())
        planner(2, debug=True).plan(collection([qr("t", 1000)]), sharders())
    (message,) = [r.getMessage() for r in caplog.records if r.name == "torchrec_qr.planner.planner"]
    assert message.startswith("1 tables on 2 ranks: ")
    assert "\nt: data_parallel on ranks [0, 1]; all-reduce " in message


def test_every_table_is_in_the_plan_or_it_is_refused() -> None:
    tables = [qr(f"t{i}", 10_000) for i in range(5)]
    made = planner(2)
    plan = made.plan(collection(tables), sharders())
    assert set(plan.plan[""]) == {t.name for t in tables}  # type: ignore[call-overload]
    del plan.plan[""]["t3"]  # type: ignore[attr-defined]
    with pytest.raises(PlannerError, match="table 't3' of module '' is not in the plan") as caught:
        made.estimate(plan, collection(tables), sharders())
    assert caught.value.error_type == NOT_IN_PLAN
