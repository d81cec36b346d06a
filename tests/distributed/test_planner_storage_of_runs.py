"""What the planner says that ranks store is what they store: of sequences, of AMSGrad, and of columns on one host."""

from dataclasses import replace

import pytest
import torch.distributed as dist
from parity_model import EPS, LR, NOT_PLAIN, OPTIMIZERS, Run, TableCase, shard, sharders_of, trained
from ranks import run_ranks
from test_planner_storage import held

from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

POOLED = ("table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel")
SEQUENCES = ("table_wise", "column_wise", "row_wise", "data_parallel")
TABLES = (
    TableCase("strided", "strided", "", plan="hand"),
    TableCase("adjacent", "adjacent", "", plan="hand", operation="add", features=("f_a", "f_b")),
    TableCase("concat", "chinese_remainder", "", plan="hand", k=3, operation="concat"),
    TableCase("explicit", "explicit", "", plan="hand"),
    TableCase("tiny", "tiny", "", plan="hand"),
)


def run_of(sharding: str, optimizer: str, pooled: bool) -> Run:
    tables = [replace(t, sharding=sharding) for t in TABLES]
    if optimizer not in NOT_PLAIN and sharding == "table_wise":
        tables.append(TableCase("plain", "plain", sharding, plan="hand"))
    return Run(tuple(tables), optimizer=optimizer, pooled=pooled, steps=1)


def measured_and_estimated(
    rank: int, world_size: int, cases: list[tuple[str, str]], pooled: bool
) -> list[tuple[str, tuple[int, int], tuple[float, float]]]:
    out = []
    for sharding, optimizer in cases:
        run = run_of(sharding, optimizer, pooled)
        sharders = sharders_of(run, {**OPTIMIZERS[optimizer], "learning_rate": LR, "eps": EPS})
        dmp = shard(run, sharders)
        trained(rank, world_size, run, dmp)
        hardware = hardware_named("cpu")
        planner = CompositionalEmbeddingShardingPlanner(hardware.topology(world_size, 2), hardware=hardware)
        model = type(dmp.module)(run.collection("meta"), [], pooled)
        cost = planner.estimate(dmp.plan, model, sharders)[rank]
        out.append((f"{sharding} {optimizer}", held(dmp, None), (cost.parameters, cost.optimizer)))
        dist.barrier()
    return out


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "sequences"])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_estimated_bytes_are_those_held(world_size: int, pooled: bool) -> None:
    shardings = POOLED if pooled else SEQUENCES
    cases = [(sharding, optimizer) for sharding in shardings for optimizer in OPTIMIZERS]
    results = run_ranks(measured_and_estimated, world_size, cases, pooled, local_world_size=2, timeout=300)
    for rank, of_rank in enumerate(results):
        assert len(of_rank) == len(cases)
        for name, (parameters, state), (estimated_parameters, estimated_state) in of_rank:
            where = f"{name} on rank {rank} of {world_size}"
            assert estimated_parameters == pytest.approx(parameters, rel=0.01), where
            assert estimated_state == pytest.approx(state, rel=0.01), where
