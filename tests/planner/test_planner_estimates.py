"""Estimates of time and bytes: TorchRec's for plain tables, and for a compositional table of one large partition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from planner_models import collection, plain, planner, qr, sharders, table
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.types import DataType

from torchrec_qr import ExplicitPartitions, HashPartition
from torchrec_qr.planner.enumerators import COLUMN_SPLIT, Enumerator, Option
from torchrec_qr.planner.tables import find_tables

TYPES = ["table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel"]
CONSTRAINTS = ParameterConstraints(sharding_types=TYPES, pooling_factors=[7.0], min_partition=64)


def options_of(config: Any, is_weighted: bool = False, device: str = "h100") -> dict[str, Option]:
    """Returns an option by sharding type. Columns are split as TorchRec splits them."""
    made = planner(16, 8, device)
    (found,) = find_tables(collection([config], is_weighted), sharders(), {config.name: CONSTRAINTS})
    options = Enumerator(made._topology, made._estimator(made._topology), 1e12).options(found)
    return {o.sharding_type: o for o in options if o.width == (64 if o.sharding_type in COLUMN_SPLIT else 128)}


def stock_options(config: Any, is_weighted: bool = False) -> dict[str, ShardingOption]:
    made = planner(16, 8)
    # Without kernels of host memory, of which our planner takes none by itself.
    constraints = {config.name: replace(CONSTRAINTS, compute_kernels=["fused", "dense"])}
    enumerator = EmbeddingEnumerator(made._topology, batch_size=8192, constraints=constraints)
    found = enumerator.enumerate(collection([config], is_weighted), sharders())
    return {o.sharding_type: o for o in found}


def work_of_stock(option: ShardingOption) -> list[float]:
    """TorchRec's total, and of the ids, which that leaves out, the share of a shard."""
    perfs = [shard.perf for shard in option.shards]
    share = {"row_wise": 16, "table_row_wise": 8, "grid_shard": 8}.get(option.sharding_type, 1)
    return [p.total + p.input_dist_comms / share for p in perfs if p is not None]


def work_of(option: Option) -> list[float]:
    return [s.cost.work_ms for block in option.blocks for s in block.shards for _ in range(s.count)]


@pytest.mark.parametrize("is_weighted", [False, True])
def test_plain_tables_take_the_time_that_torchrec_estimates(is_weighted: bool) -> None:
    config = plain("t", 1_000_003)
    ours, stock = options_of(config, is_weighted), stock_options(config, is_weighted)
    assert set(ours) == set(stock) == set(TYPES)
    for sharding_type in TYPES:
        expected = work_of_stock(stock[sharding_type])
        assert work_of(ours[sharding_type]) == pytest.approx(expected, rel=1e-12), sharding_type


def test_plain_tables_take_the_bytes_that_torchrec_estimates() -> None:
    config = plain("t", 1_000_003)
    ours, stock = options_of(config), stock_options(config)
    for sharding_type in TYPES:
        shards = [s for block in ours[sharding_type].blocks for s in block.shards for _ in range(s.count)]
        bytes_of_stock = [shard.storage.hbm for shard in stock[sharding_type].shards if shard.storage is not None]
        without_state = [s.cost.memory - s.cost.optimizer for s in shards]
        assert without_state == pytest.approx(bytes_of_stock, rel=1e-6), sharding_type


@pytest.mark.parametrize("is_weighted", [False, True])
def test_one_partition_takes_the_time_of_a_plain_table(is_weighted: bool) -> None:
    # The cache holds no shard of so many rows.
    ours = options_of(table("t", HashPartition(rows=10_000_019), 100_000_000), is_weighted)
    stock = stock_options(plain("t", 10_000_019), is_weighted)
    for sharding_type in TYPES:
        if sharding_type == "data_parallel":
            continue  # TorchRec's own have another kernel, of half the bandwidth
        assert work_of(ours[sharding_type]) == pytest.approx(work_of_stock(stock[sharding_type])), sharding_type


def test_replicas_beside_split_rows_are_reduced_on_every_rank() -> None:
    config = qr("t", 10_000_000, num_collisions=1000)  # 10,000 rows split, 1,000 replicated
    for sharding_type in ("row_wise", "table_row_wise", "grid_shard"):
        everywhere = options_of(config)[sharding_type].everywhere
        assert everywhere.parameters == everywhere.optimizer == 1000 * 128 * 4
        assert everywhere.reduce_ms > 0
    assert options_of(config)["table_wise"].everywhere.memory == 0


def test_gradients_of_replicas_are_reduced_in_fp32_on_a_gpu_whatever_they_store() -> None:
    full, half = (
        options_of(qr("t", 10_000_000, data_type=data_type))["data_parallel"].blocks[0].shards[0].cost
        for data_type in (DataType.FP32, DataType.FP16)
    )
    assert half.parameters == full.parameters - 2_500_000 * 128 * 2
    assert half.reduce_ms == full.reduce_ms


def test_explicit_maps_are_counted_where_they_are_needed() -> None:
    ids = torch.arange(10_000)
    config = table("t", ExplicitPartitions(torch.stack([ids % 100, ids // 100])), 10_000)
    size = config.bound_partitions.class_map.nbytes  # type: ignore[union-attr]
    options = options_of(config)
    assert options["table_wise"].blocks[0].shards[0].cost.maps == size
    assert options["table_wise"].everywhere.maps == 0
    assert options["row_wise"].everywhere.maps == size  # the source rank encodes ids, and a shard reads the same copy
    assert options["row_wise"].blocks[0].shards[0].cost.maps == 0
    on_cpu = options_of(config, device="cpu")
    assert on_cpu["table_wise"].everywhere.maps == size  # one tensor in each process, whatever the plan
    assert on_cpu["table_wise"].blocks[0].shards[0].cost.maps == 0
