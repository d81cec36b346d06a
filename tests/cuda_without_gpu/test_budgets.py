"""Budgets of a step, whatever the tables. `test_devices` compares the committed table with what steps cost."""

import json
from typing import Any

import pytest
import step_costs
from device_cases import UNSHARDED, DeviceCase, cases

# Each would keep the host from running ahead of the device.
WAITS = 0
# To fill the verdict on the ids, and to prepare them.
INPUT_DIST = 2
# One kernel for all tables that are alike; to fill the verdict on the batch, and the output of sequences, of which
# wrong offsets leave holes; and to sum and add the zeros of replicas that this rank has no ids for.
FORWARD = 5
# Blocks of tables and keys; per partition number of two a sort, and sums of ranges, of sums, and of long rows; and to
# fill and step the rows that wait, which those of one number do under ``mult``.
BACKWARD = 12
# To copy a gradient of the output that is not contiguous, as that of a sum is.
COPY = 1
# A gradient of every row begins with zeros: one launch per data type.
DENSE_GRADIENTS = 1
# To pick the sizes of bags, and to divide by them.
MEAN = 7
# To sort the ids of all features at once, and to number those that are unique.
INDEX_DEDUP = 25
# To step the rows; to join masks, of rules that move rows without a gradient, before their reduction; to divide sums.
REPLICAS_OF_A_BUCKET = 3
# About 5 µs of the host each. Of a replica: its view in the forward, its gradient, and two for its place in the bucket.
DISPATCHER_CALLS, CALLS_OF_A_REPLICA = 60, 4

STEPS = json.loads(step_costs.TABLE.read_text())["steps"]
CASES = {case.id: case for case in cases() if case.id in STEPS}
ALIKE = [c for c in CASES.values() if c.operation != "path" and c.sharding != UNSHARDED]


def own(case: str, kind: str) -> dict[str, int]:
    """The costs of this library of a kind, by place."""
    start = f"{step_costs.OWN}, {kind}, "
    return {key.removeprefix(start): n for key, n in STEPS[case].items() if key.startswith(start)}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case: str) -> None:
    for kind in step_costs.WAITS:
        assert sum(own(case, kind).values()) == WAITS, own(case, kind)


@pytest.mark.parametrize("case", [c.id for c in ALIKE if "in all" not in own(c.id, "launches")])
def test_launches_do_not_depend_on_tables(case: str) -> None:
    launches = own(case, "launches")
    of_input = _sum(launches, "id_launches", "send_ids")
    of_forward = _sum(launches, "launch forward", "batch_of", "look_up", "_CompositionalLookup.forward")
    of_copy = _sum(launches, "_aligned")
    of_dense = _sum(launches, "_dense_gradients")
    of_replicas = _sum(launches, "replication.py", "fused_optimizer.py", "step_replicas")
    assert of_input <= INPUT_DIST
    assert of_forward <= FORWARD
    assert of_copy <= COPY
    assert of_dense <= DENSE_GRADIENTS
    assert of_replicas <= REPLICAS_OF_A_BUCKET
    of_mean = _sum(launches, "embeddingbag.py")
    of_dedup = _sum(launches, "unique_ids", "_dedup_indices")
    assert of_mean <= MEAN
    assert of_dedup <= INDEX_DEDUP
    others = of_input + of_forward + of_copy + of_dense + of_replicas + of_mean + of_dedup
    assert sum(launches.values()) - others <= BACKWARD


@pytest.mark.parametrize("case", ALIKE, ids=lambda case: case.id)
def test_dispatcher_calls_do_not_depend_on_tables(case: DeviceCase) -> None:
    calls = own(case.id, "dispatcher calls").get("in all", 0)  # none of a rank without tables
    per_table = {"data_parallel": 2, "row_wise": 1, "table_row_wise": 1, "grid_shard": 1}.get(case.sharding, 0)
    assert calls <= DISPATCHER_CALLS + CALLS_OF_A_REPLICA * per_table * case.tables


def _sum(launches: dict[str, Any], *places: str) -> int:
    return sum(n for key, n in launches.items() if any(place in key for place in places))
