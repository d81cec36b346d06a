"""Nothing is read before it has arrived: tables of every kind train on poison as on gloo, and as the reference does.

See `poison_group`. One rank shows every missing wait of this project's own; two and four have something to reduce,
ranks that own none of a table, and an order of collectives that must be the same on all of them.
"""

from functools import cache

import pytest
from pairwise import all_pairs, pairs_of, pairwise
from parity_model import Run, TableCase
from parity_reference import Exact
from poison_compare import assert_same, assert_same_order
from poison_group import register
from poison_tables import Journaled, train_all_journaled
from ranks import run_ranks
from varied_runs import FACTORS, SEQUENCE_FACTORS, possible, runs_of

RUNS = runs_of(FACTORS, pooled=True) | runs_of(SEQUENCE_FACTORS, pooled=False)
# Two ranks have all of it; one rank and four take as long.
WORLD_SIZES = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
TABLES = [pytest.param(name, t, id=f"{name}-{t.name}") for name, run in RUNS.items() for t in run.tables]


@cache
def ended(world_size: int, backend: str) -> list[dict[str, Journaled]] | Exception:
    """Returns the outcomes of each rank by run. Four ranks are two nodes. A failure is kept, not tried again."""
    made = register if backend == "poison" else backend
    try:
        return run_ranks(train_all_journaled, world_size, RUNS, local_world_size=min(world_size, 2), backend=made)
    except Exception as error:
        return error


def outcomes(world_size: int, backend: str) -> list[dict[str, Journaled]]:
    of_ranks = ended(world_size, backend)
    if isinstance(of_ranks, Exception):
        raise of_ranks
    return of_ranks


@cache
def exact(world_size: int, name: str) -> Exact:
    return Exact(RUNS[name], [rank[name] for rank in outcomes(world_size, "poison")])


@pytest.mark.parametrize("factors", [FACTORS, SEQUENCE_FACTORS], ids=["bags", "sequences"])
def test_every_pair_of_values_occurs(factors: dict[str, tuple[object, ...]]) -> None:
    occurring = {pair for case in pairwise(factors, possible) for pair in pairs_of(case, factors)}
    assert set(all_pairs(factors, possible)) == occurring


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("name", "table"), TABLES)
def test_a_table_trains_as_on_gloo(world_size: int, name: str, table: TableCase) -> None:
    run: Run = RUNS[name]
    for poisoned, plain in zip(outcomes(world_size, "poison"), outcomes(world_size, "gloo"), strict=True):
        assert_same(poisoned[name], plain[name], run, table)
    exact(world_size, name).assert_close(table)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", RUNS)
def test_tensors_under_way_are_left_alone(world_size: int, name: str) -> None:
    """Neither what is sent is changed, nor is anything written to where a result will arrive."""
    for rank in outcomes(world_size, "poison"):
        assert rank[name].issued or world_size == 1
        assert rank[name].violations == []


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("name", RUNS)
def test_ranks_issue_the_same_collectives_in_the_same_order(world_size: int, name: str) -> None:
    assert_same_order([rank[name].issued for rank in outcomes(world_size, "poison")])
