"""Milliseconds of lookups, against bytes that are counted here by hand from the reads and writes of the kernels."""

from typing import Any

import pytest
from planner_models import collection, planner, qr, sharders, table
from torchrec.distributed.planner.types import ParameterConstraints

from torchrec_qr import ChineseRemainder, HashPartition, QuotientRemainder
from torchrec_qr.planner import hardware_named
from torchrec_qr.planner.costs import Cost
from torchrec_qr.planner.tables import find_tables

BATCH, PER_BAG = 8192, 7
H100_BYTES_PER_MS = 3350e9 / 1e3
# Ranks whose ids a shard looks up; its columns; TorchRec's penalty of narrow ones; the blocks of the base partition.
SHARDS = {
    "table_wise": (16, 128, 1.0, 1),
    "column_wise": (16, 64, 1.15, 1),
    "table_column_wise": (16, 64, 1.15, 1),
    "row_wise": (1, 128, 1.0, 16),
    "table_row_wise": (2, 128, 1.0, 8),
    "grid_shard": (2, 64, 1.0, 8),
    "data_parallel": (1, 128, 1.0, 1),
}


def cost_of(config: Any, sharding_type: str = "table_wise", device: str = "h100", is_weighted: bool = False) -> Cost:
    """Returns the cost of the first shard on 2 nodes of 8 ranks."""
    made = planner(16, 8, device, batch_size=BATCH)
    constraints = {config.name: ParameterConstraints(pooling_factors=[float(PER_BAG)])}
    (found,) = find_tables(collection([config], is_weighted), sharders(), constraints)
    _, columns, _, blocks = SHARDS[sharding_type]
    return made._estimator(made._topology).shard(
        found, sharding_type, "fused", rows=found.rows // blocks, columns=(0, columns), num_blocks=blocks
    )


def test_a_cached_partition_costs_its_gradients_and_ids_and_no_rows() -> None:
    ids, bags = BATCH * PER_BAG * 16, BATCH * 16
    forward = 8 * ids + 512 * bags  # ids are read, and outputs are written
    keys = 8 + 4  # an id is read, and the place of its gradient is written
    keys += 2 + 8  # a key of 16 bits and the number of the id are written
    keys += 2 + 2 * (2 + 8) * 2  # digits are counted, and each of two passes reads and writes key and number
    keys += 2 + 8 + 4  # key, number and place are read
    gradients = 512 + 512 * 2 / 32  # a row is read for each id, and a sum is written and read for 32 ids
    expected = (forward + ids * (keys + gradients)) / H100_BYTES_PER_MS
    for rows in (300, 30_000):
        assert cost_of(table("t", HashPartition(rows=rows), 10**6)).lookup_ms == pytest.approx(expected, rel=1e-12)
    # A sum of two partitions composes in registers, and each has a backward.
    both = table("t", QuotientRemainder(num_collisions=1000), 10**6, operation="add")
    expected = (forward + ids * (2 * (keys + gradients) - 12)) / H100_BYTES_PER_MS
    assert cost_of(both).lookup_ms == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_product_reads_the_keys_of_the_others_and_keeps_sums_for_the_step(is_weighted: bool) -> None:
    ids = BATCH * PER_BAG * 16
    ways = {
        operation: cost_of(
            table("t", QuotientRemainder(num_collisions=1000), 10**6, operation=operation), is_weighted=is_weighted
        ).lookup_ms
        for operation in ("add", "mult")
    }
    waiting = 2 * 1000 * (512 + 12)  # the sum, row and table of each row of the smaller partition, written and read
    expected = (ids * (2 + 2) + waiting) / H100_BYTES_PER_MS
    assert ways["mult"] - ways["add"] == pytest.approx(expected, rel=1e-9)


def test_weights_of_ids_are_read_again_for_each_cached_partition() -> None:
    ids, bags = BATCH * PER_BAG * 16, BATCH * 16
    config = table("t", QuotientRemainder(num_collisions=1000), 10**6)
    forward = 16 * ids + 512 * bags  # TorchRec counts a weight as an id
    # The kernel of the gradients of weights takes 1.1 times the forward.
    expected = (8 * ids + ids * 2 * 4 + 1.1 * forward) / H100_BYTES_PER_MS
    without = cost_of(config).lookup_ms
    assert cost_of(config, is_weighted=True).lookup_ms - without == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sharding_type", SHARDS)
def test_a_cached_partition_beside_one_in_memory_adds_a_backward_and_sends_nothing(sharding_type: str) -> None:
    ranks, columns, _, _ = SHARDS[sharding_type]
    one = cost_of(table("t", HashPartition(rows=2_500_000), 10_000_000), sharding_type)
    two = cost_of(qr("t", 10_000_000), sharding_type)
    assert two.comms_ms == pytest.approx(one.comms_ms)
    gradient, row = 4 * columns * (1 + 2 / 32), 4 * columns  # the row of the large partition is a factor
    keys = (1 + 8) + (1 + 1 * (1 + 8) * 2) + (1 + 8 + 4)
    of_others = 1 + 4
    waiting = 2 * 4 * (4 * columns + 12)
    expected = (BATCH * PER_BAG * ranks * (gradient + row + keys + of_others) + waiting) / H100_BYTES_PER_MS
    assert two.lookup_ms - one.lookup_ms == pytest.approx(expected, rel=1e-9)


def test_partitions_in_memory_have_a_plain_tables_backward_each_and_are_factors_of_each_other() -> None:
    ids, bags = BATCH * PER_BAG * 16, BATCH * 16
    sizes = ChineseRemainder(sizes=[200_003, 200_009])
    forward = (8 + 2 * 512) * ids + 512 * bags
    backward = 2 * 2 * ((8 + 512) * ids + 512 * bags)
    expected = (forward + backward) / H100_BYTES_PER_MS
    assert cost_of(table("t", sizes, 10**7, operation="add")).lookup_ms == pytest.approx(expected, rel=1e-12)
    factors = ids * 2 * (512 + 4) + 2 * 200_003 * (512 + 12)  # rows and keys; sums of the smaller partition
    expected += factors / H100_BYTES_PER_MS
    assert cost_of(table("t", sizes, 10**7, operation="mult")).lookup_ms == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sharding_type", SHARDS)
def test_a_cpu_reads_all_rows_from_memory(sharding_type: str) -> None:
    ranks, columns, penalty, _ = SHARDS[sharding_type]
    ids, bags = BATCH * PER_BAG * ranks, BATCH * (1 if sharding_type == "data_parallel" else 16)
    forward = (8 * ids + 2 * 4 * columns * ids * 0.45 + 4 * columns * bags) * penalty / 5.5e6
    cost = cost_of(qr("t", 1000), sharding_type, "cpu")
    assert cost.lookup_ms == pytest.approx(3 * forward + 0.1, rel=1e-12)


@pytest.mark.parametrize(("device", "mib"), [("a100", 40), ("h100", 50), ("h200", 50)])
def test_a_partition_is_cached_up_to_the_size_of_the_cache(device: str, mib: int) -> None:
    most = mib * 2**20 // 512
    hardware = hardware_named(device)
    ids, bags = BATCH * PER_BAG * 16, BATCH * 16

    def megabytes(rows: int) -> float:
        return cost_of(table("t", HashPartition(rows=rows), 10**6), device=device).lookup_ms * hardware.memory_gb_s

    in_memory = 3 * (8 * ids + 512 * ids + 512 * bags) / 1e6
    assert megabytes(most + 1) == pytest.approx(in_memory, rel=1e-9)
    assert megabytes(most) < 0.6 * in_memory
