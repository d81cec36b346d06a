"""The planner's choices: balance, data-parallel where that is cheaper, constraints, and no worse than TorchRec's."""

from typing import Any

import pytest
import torch
from planner_models import SHARDED, collection, mlperf, only, plain, planner, qr, sharders, table
from single_tables import sequence_table
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints

from benchmarks.planner_scale import zipf
from torchrec_qr import (
    CompositionalEmbeddingCollection,
    ExplicitPartitions,
    QuotientRemainder,
)
from torchrec_qr.distributed import get_default_sharders
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named
from torchrec_qr.planner.estimated_plan import EstimatedPlan

CLUSTERS = {8: (8, 8), 16: (16, 8), 64: (64, 8)}
EACH_CLUSTER = [8, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (16, 64))]


def types_of(estimated: EstimatedPlan) -> dict[str, str]:
    return {p.table.name: p.option.sharding_type for p in estimated.tables}


@pytest.mark.parametrize("ranks", EACH_CLUSTER)
def test_work_is_balanced(ranks: int) -> None:
    for tables, constraints in (mlperf(), zipf(1000)):
        estimated = planner(*CLUSTERS[ranks], constraints=constraints).propose(collection(tables), sharders())
        assert len(estimated.tables) == len(tables)
        assert estimated.ranks.balance <= 1.05
        assert max(estimated.ranks.memory) <= min(estimated.reserved)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [8, 16, 64])
def test_work_is_balanced_without_data_parallel(ranks: int) -> None:
    for tables, constraints in (mlperf(), zipf(1000)):
        forbidden = only(constraints, tables, SHARDED)
        estimated = planner(*CLUSTERS[ranks], constraints=forbidden).propose(collection(tables), sharders())
        assert "data_parallel" not in types_of(estimated).values()
        assert estimated.ranks.balance <= 1.05


def replicated(num_collisions: int, num_embeddings: int, ranks: int = 16) -> tuple[set[str], float, float]:
    """Returns the sharding types of equal tables, and the cost of one on a rank, replicated and sharded at best."""
    tables = [qr(f"t{i}", num_embeddings, num_collisions) for i in range(ranks)]
    estimated = planner(ranks, 8, without_fixed_costs=True).propose(collection(tables), sharders())
    choices = estimated.tables[0].choices
    replicate = next(o.mean_work for o in choices if o.sharding_type == "data_parallel")
    shard = min(o.mean_work for o in choices if o.sharding_type != "data_parallel")
    return set(types_of(estimated).values()), replicate, shard


def test_data_parallel_is_chosen_exactly_where_it_is_cheaper() -> None:
    # With more collisions fewer rows are reduced, and equal embeddings travel.
    low, high = 2, 3000
    while high - low > 1:
        middle = (low + high) // 2
        _, replicate, shard = replicated(middle, 10_000_000)
        low, high = (low, middle) if replicate < shard else (middle, high)
    sharded, replicate, shard = replicated(low, 10_000_000)
    assert replicate >= shard
    assert sharded == {"table_wise"}
    chosen, replicate, shard = replicated(high, 10_000_000)
    assert replicate < shard
    assert chosen == {"data_parallel"}
    assert 1 < high < 3000


def test_tables_of_least_rows_are_all_replicated_and_say_what_that_saves() -> None:
    tables, constraints = mlperf()
    least = [qr(t.name, t.num_embeddings, max(2, round(t.num_embeddings**0.5))) for t in tables]
    estimated = planner(64, 8, constraints=constraints).propose(collection(least), sharders())
    assert set(types_of(estimated).values()) == {"data_parallel"}
    for p in estimated.tables:
        reduce_ms = p.option.blocks[0].shards[0].cost.reduce_ms
        assert reduce_ms > 0
        assert f"all-reduce {reduce_ms:.3g} ms" in p.why
        assert "all-to-all" in p.why


def test_plans_keep_to_constraints() -> None:
    tables = [qr("rows", 10_000_000), qr("columns", 10_000_000), qr("bound", 10_000_000), plain("kernel", 1000)]
    constraints = {
        "rows": ParameterConstraints(sharding_types=["row_wise"]),
        "columns": ParameterConstraints(sharding_types=["column_wise"], min_partition=32),
        "kernel": ParameterConstraints(compute_kernels=["dense"]),
    }
    made = planner(16, 8, constraints=constraints, ranks={"bound": [5], "columns": [0, 1, 9]})
    plan: Any = made.plan(collection(tables), sharders()).plan[""]
    assert plan["rows"].sharding_type == "row_wise"
    assert plan["rows"].ranks == list(range(16))
    assert plan["columns"].sharding_type == "column_wise"
    assert {s.shard_sizes[1] for s in plan["columns"].sharding_spec.shards} <= {32, 64, 128}
    assert set(plan["columns"].ranks) <= {0, 1, 9}
    assert plan["bound"].ranks == [5] * len(plan["bound"].ranks)
    assert (plan["kernel"].sharding_type, plan["kernel"].compute_kernel) == ("data_parallel", "dense")


def test_a_plan_says_which_rows_lie_outside_of_the_device() -> None:
    """A full table of 25 GiB has no place on devices of 1 GiB, so that it lies in the hosts' memory."""
    h100 = hardware_named("h100")
    made = CompositionalEmbeddingShardingPlanner(h100.topology(2, memory_gib=1.0), hardware=h100)
    full = EmbeddingBagCollection(
        tables=[plain("large", 50_000_000), plain("small", 1000)], device=torch.device("meta")
    )
    large, small = made.propose(full, get_default_sharders()).tables
    assert large.option.kernel == "fused_uvm"
    assert large.why.endswith("; not in the device's memory, by fused_uvm")
    assert "memory" not in small.why


def test_what_a_sharder_would_refuse_is_not_planned() -> None:
    ids = torch.arange(10_000)
    classes = torch.stack([ids % 100, ids // 100])
    path = table("path", ExplicitPartitions(classes), 10_000, dim=16, operation="path", path_hidden=4)
    estimated = planner(16, 8).propose(collection([path, qr("t", 10_000_000)]), sharders())
    offered = {o.sharding_type for o in estimated.tables[0].choices}
    assert offered == {"table_wise", "row_wise", "table_row_wise", "data_parallel"}


def test_sequences_are_planned_with_one_width_of_columns() -> None:
    tables = [
        sequence_table(
            QuotientRemainder(num_collisions=4),
            name=name,
            num_embeddings=1_000_000,
            embedding_dim=dim,
        )
        for name, dim in (("narrow", 64), ("wide", 128))
    ]
    ec = CompositionalEmbeddingCollection(tables=tables, device=torch.device("meta"))
    plan: Any = planner(2).plan(ec, get_default_sharders()).plan[""]
    assert set(plan) == {"narrow", "wide"}
    assert {s.sharding_type for s in plan.values()} <= {"table_wise", "row_wise", "data_parallel"}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("seed", "without_fixed_costs"), [(0, False), (1, True)])
def test_plans_of_plain_tables_are_no_worse_than_torchrecs(ranks: int, seed: int, without_fixed_costs: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1000, 5_000_000, (12,), generator=generator).tolist()
    poolings = torch.randint(1, 60, (12,), generator=generator).tolist()
    ebc = EmbeddingBagCollection(
        tables=[plain(f"t{i}", n, dim=(64, 128)[i % 2]) for i, n in enumerate(rows)], device=torch.device("meta")
    )
    constraints = {f"t{i}": ParameterConstraints(pooling_factors=[float(p)]) for i, p in enumerate(poolings)}
    made = planner(ranks, constraints=constraints, without_fixed_costs=without_fixed_costs)
    stock = EmbeddingShardingPlanner(
        topology=made._topology,
        batch_size=8192,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.15),
    )
    all_sharders = [EmbeddingBagCollectionSharder()]
    ours = made.step_ms(made.plan(ebc, all_sharders), ebc, all_sharders)  # type: ignore[arg-type]
    theirs = made.step_ms(stock.plan(ebc, all_sharders), ebc, all_sharders)  # type: ignore[arg-type]
    assert ours <= 1.05 * theirs
