"""Tables that `same_rank_as` ties lie on the same ranks, and a tie that cannot hold is refused by name."""

from typing import Any

import pytest
from planner_models import collection, plain, planner, qr, sharders
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType

from torchrec_qr.planner.error_kinds import WRONG_INPUT
from torchrec_qr.planner.estimated_plan import EstimatedPlan

# Sizes whose row blocks differ: 250 rows on 16 ranks leave ranks without rows.
TABLES = [qr("a", 10_000_000), qr("b", 1_000_003, dim=64), plain("c", 250), plain("d", 2_000_000), qr("e", 40_000_000)]


def of_types(*types: str, tables: str = "abc") -> dict[str, ParameterConstraints]:
    return {name: ParameterConstraints(sharding_types=list(types)) for name in tables}


def proposed(world_size: int, local: int, **arguments: Any) -> tuple[EstimatedPlan, Any]:
    """Returns a plan, and the costs that the planner estimates of it as of a plan that another planner made."""
    made = planner(world_size, local, **arguments)
    module = collection(TABLES)
    estimated = made.propose(module, sharders())
    return estimated, made.estimate(estimated.sharding_plan(), module, sharders())


@pytest.mark.parametrize(
    "sharding_type",
    ["table_wise", "column_wise", "row_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"],
)
def test_shards_of_tied_tables_lie_on_the_same_ranks_and_cost_their_sum(sharding_type: str) -> None:
    ties = {"b": "a", "c": "b"}
    estimated, costs = proposed(16, 8, same_rank_as=ties, constraints=of_types(sharding_type))
    ranks = {p.table.name: p.ranks for p in estimated.tables}
    assert ranks["a"] == ranks["b"] == ranks["c"]
    assert {p.option.sharding_type for p in estimated.tables[:3]} == {sharding_type}
    assert estimated.ranks.memory == pytest.approx(costs.memory)
    assert estimated.ranks.work_ms == pytest.approx(costs.work_ms)
    assert estimated.tables[1].why.endswith("; on the ranks of 'a'")
    if sharding_type == "table_wise":
        free, _ = proposed(16, 8, constraints=of_types(sharding_type))
        assert len({tuple(p.ranks) for p in free.tables[:3]}) == 3


def test_tied_tables_keep_to_the_ranks_that_each_may_have() -> None:
    ranks = {"a": [1, 2, 3], "b": [2, 3, 5], "c": [3, 9]}
    estimated, _ = proposed(16, 8, same_rank_as={"a": "b", "c": "b"}, ranks=ranks)
    assert [set(p.ranks) for p in estimated.tables[:3]] == [{3}] * 3
    assert set(estimated.tables[4].ranks) - {3}


def test_tied_tables_without_constraints_share_the_type_that_is_cheapest_for_all() -> None:
    estimated, costs = proposed(8, 8, same_rank_as={"e": "c"})
    small, large = estimated.tables[2], estimated.tables[4]
    assert small.option.sharding_type == large.option.sharding_type != "data_parallel"
    assert small.ranks == large.ranks
    assert estimated.ranks.work_ms == pytest.approx(costs.work_ms)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"same_rank_as": {"a": "a"}}, r"same_rank_as: 'a' → 'a'; allowed: a chain that ends"),
        ({"same_rank_as": {"a": "b", "b": "c", "c": "b"}}, r"same_rank_as: 'b' → 'c' → 'b'; allowed: a chain"),
        (
            {"same_rank_as": {"a": "x"}},
            r"of table 'a': 'x'; table 'x' is not in the model; allowed: 'a', 'b', 'c', 'd'",
        ),
        ({"same_rank_as": {"x": "a"}}, r"of table 'x': 'a'; table 'x' is not in the model"),
        (
            {"same_rank_as": {"a": "b"}, "ranks": {"a": [0, 1], "b": [2]}},
            r"'a' has ranks \[0, 1\]; 'b' has ranks \[2\]; allowed: ranks with at least one in common",
        ),
    ],
)
def test_ties_that_contradict_one_another_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PlannerError, match=said) as caught:
        planner(4, **arguments).plan(collection(TABLES), sharders())
    assert caught.value.error_type == WRONG_INPUT


def test_tied_tables_without_a_common_sharding_type_are_named() -> None:
    constraints = of_types("table_wise", tables="a") | of_types("row_wise", "table_row_wise", tables="b")
    with pytest.raises(PlannerError, match=r"'a' may be table_wise; 'b' may be row_wise, table_row_wise; allowed") as e:
        planner(16, 8, same_rank_as={"b": "a"}, constraints=constraints).plan(collection(TABLES), sharders())
    assert e.value.error_type == PlannerErrorType.STRICT_CONSTRAINTS
    # Both are column-wise, and the shards of one are four and of the other two.
    four = ParameterConstraints(sharding_types=["column_wise"], min_partition=32)
    two = ParameterConstraints(sharding_types=["column_wise"], min_partition=64)
    tables = [plain("a", 1000), plain("b", 1000)]
    estimated = planner(4, same_rank_as={"b": "a"}, constraints={"a": four, "b": two}).propose(
        collection(tables), sharders()
    )
    assert [len(p.ranks) for p in estimated.tables] == [2, 2]


@pytest.mark.slow
def test_tied_tables_that_do_not_fit_are_named_with_changes_that_help() -> None:
    ties = {"b": "a", "d": "a"}
    constraints = of_types("table_wise", tables="abd")
    # Values and Adagrad's state: 2 · 512 · (2,500,004 + 2,000,000) + 2 · 256 · 250,005 bytes, and buffers.
    made = planner(4, memory_gib=4.8, batch_size=64, same_rank_as=ties, constraints=constraints)
    assert not made.fits(collection(TABLES[:4]), sharders())
    with pytest.raises(PlannerError) as caught:
        made.plan(collection(TABLES[:4]), sharders())
    assert caught.value.error_type == PlannerErrorType.INSUFFICIENT_STORAGE
    first, _, *changes = str(caught.value).splitlines()
    assert first.startswith("no plan fits: tables 'a', 'b', 'd', which same_rank_as ties, need 4.41 GiB of memory")
    assert "4.08 GiB (ranks 0-3)" in first
    assert changes[0] == "  1. different ranks: no same_rank_as for tables 'a', 'b', 'd'"
    assert changes[1] == "  2. another sharding type: column_wise for tables 'a', 'b', 'd'"
    assert "num_collisions=" in changes[2]
    for helps in (
        {"constraints": constraints},
        {"same_rank_as": ties, "constraints": of_types("column_wise", tables="abd")},
    ):
        assert planner(4, memory_gib=4.8, batch_size=64, **helps).fits(collection(TABLES[:4]), sharders())


def test_a_device_group_of_another_device_is_refused() -> None:
    allowed = {"a": ParameterConstraints(device_group="cuda")}
    planner(4, constraints=allowed).plan(collection(TABLES), sharders())
    with pytest.raises(PlannerError, match=r"table 'a': device_group='cpu'; allowed: 'cuda', the device of the ranks"):
        planner(4, constraints={"a": ParameterConstraints(device_group="cpu")}).plan(collection(TABLES), sharders())
