"""What the planner says that ranks store is what they store."""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from parity_model import NOT_PLAIN, OPTIMIZERS, Run, TableCase, shard_run, trained
from placements import BASIC_SHARDINGS, COLUMN_SPLIT, SHARDINGS
from ranks import run_ranks
from sharded_model import ADAGRAD, EPS, LR, ROWWISE, SGD, Model, shard, sharders_of, tables, train, unsharded
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

ALL_KINDS = (*BASIC_SHARDINGS, "table_row_wise", "grid_shard")
OF_ALL_KINDS = (SGD, ADAGRAD, ROWWISE, EmbOptimType.ADAM)
OF_RUNS = (
    TableCase("strided", "strided", "", plan="hand"),
    TableCase("adjacent", "adjacent", "", plan="hand", operation="add", features=("f_a", "f_b")),
    TableCase("concat", "chinese_remainder", "", plan="hand", k=3, operation="concat"),
    TableCase("explicit", "explicit", "", plan="hand"),
    TableCase("tiny", "tiny", "", plan="hand"),
)


def storage_bytes(values: list[Any]) -> int:
    """Of the distinct storages behind tensors, of which a rank may show one under several names."""
    found = {}

    def visit(value: Any) -> None:
        if isinstance(value, ShardedTensor):
            for piece in value.local_shards():
                visit(piece.tensor)
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()

    for value in values:
        visit(value)
    return sum(found.values())


def held(model: nn.Module, dense: torch.optim.Optimizer | None) -> tuple[int, int]:
    """Bytes of parameters and of optimizer state that this rank holds of the collection."""
    weights = [value for name, value in model.state_dict().items() if name.endswith(".weight")]
    fused = [v for state in model.fused_optimizer.state_dict()["state"].values() for v in state.values()]  # type: ignore[union-attr, operator]
    of_dense = [] if dense is None else [v for state in dense.state.values() for v in state.values()]
    return storage_bytes(weights), storage_bytes([*fused, *of_dense])


Found = tuple[tuple[int, int], tuple[float, float]]


def held_and_estimated(
    dmp: DistributedModelParallel, model: nn.Module, sharders: list[Any], dense: torch.optim.Optimizer | None = None
) -> Found:
    """Bytes of parameters and of optimizer state on this rank: those held, and those by the planner."""
    hardware = hardware_named("cpu")
    topology = hardware.topology(dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
    planner = CompositionalEmbeddingShardingPlanner(topology, hardware=hardware, dense_optimizer=torch.optim.Adam)
    cost = planner.estimate(dmp.plan, model, sharders)[dist.get_rank()]
    found = held(dmp, dense), (cost.parameters, cost.optimizer)
    dist.barrier()
    return found


def of_all_kinds(sharding: str, optimizer: EmbOptimType) -> Found:
    """Tables of all kinds, and a plain one by TorchRec's dense kernel, which nothing steps in backward."""
    model = shard(tables(), sharding, optimizer)
    left = [p for name, p in model.named_parameters() if name.endswith(".plain.weight") and p.numel()]
    dense = torch.optim.Adam(left) if left else None
    train(model, tables(), range(1))
    if dense is not None:
        for p in left:
            p.grad = torch.zeros_like(p)
        dense.step()
    sharders = sharders_of({"optimizer": optimizer, "learning_rate": LR, "eps": EPS})
    return held_and_estimated(model, unsharded(tables()), sharders, dense)


def of_run(pooled: bool, sharding: str, optimizer: str) -> Found:
    """Tables by hand with AMSGrad too, and a plain one by the fused kernel."""
    of = [replace(t, sharding=sharding) for t in OF_RUNS]
    if optimizer not in NOT_PLAIN and sharding == "table_wise":
        of.append(TableCase("plain", "plain", sharding, plan="hand"))
    run = Run(tuple(of), optimizer=optimizer, pooled=pooled, steps=1)
    dmp = shard_run(run)
    trained(dist.get_rank(), dist.get_world_size(), run, dmp)
    return held_and_estimated(dmp, Model(run.collection("meta")), run.sharders())


def found_of_cases(rank: int, world_size: int, found_of: Any, cases: list[tuple[str, Any]]) -> list[Found]:
    return [found_of(*case) for case in cases]


_SLOW = pytest.mark.slow
QUICK = ("sgd", "adagrad", "rowwise_adagrad", "adam", "amsgrad")
# Counts of steps, of which the planner has one for each shard of a rank, are more than 1 % of their small state.
SMALL = ("partial_rowwise_adam", "partial_rowwise_lamb")


@pytest.mark.parametrize(
    ("world_size", "local_world_size", "found_of", "shardings", "optimizers"),
    [
        (2, 2, of_all_kinds, ALL_KINDS[:-1], OF_ALL_KINDS),
        (4, 2, of_all_kinds, ALL_KINDS, OF_ALL_KINDS),
        pytest.param(4, 4, of_all_kinds, ALL_KINDS[:-1], OF_ALL_KINDS, marks=_SLOW),
        (2, 2, partial(of_run, True), SHARDINGS, QUICK),
        (2, 2, partial(of_run, False), BASIC_SHARDINGS, QUICK),
        pytest.param(4, 2, partial(of_run, True), SHARDINGS, OPTIMIZERS, marks=_SLOW),
        pytest.param(4, 2, partial(of_run, False), BASIC_SHARDINGS, OPTIMIZERS, marks=_SLOW),
    ],
    ids=[
        "all_kinds-2",
        "all_kinds-2_hosts_of_2",
        "all_kinds-4",
        "pooled-2",
        "sequences-2",
        "pooled-2_hosts_of_2",
        "sequences-2_hosts_of_2",
    ],
)
def test_estimated_bytes_are_those_held(
    world_size: int, local_world_size: int, found_of: Any, shardings: tuple[str, ...], optimizers: Any
) -> None:
    cases = [(s, o) for s in shardings for o in optimizers if not (s in COLUMN_SPLIT and o in SMALL)]
    results = run_ranks(found_of_cases, world_size, found_of, cases, local_world_size=local_world_size, timeout=300)
    for rank, of_rank in enumerate(results):
        for case, (bytes_held, estimated) in zip(cases, of_rank, strict=True):
            assert estimated == pytest.approx(bytes_held, rel=0.01), f"{case} on rank {rank} of {world_size}"
