"""What the planner says that ranks store is what they store."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from ranks import run_ranks
from sharded_model import ADAGRAD, ROWWISE, SGD, shard, tables, train
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import CompositionalEmbeddingBagCollection
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

SHARDINGS = ("table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel")
OPTIMIZERS = (SGD, ADAGRAD, ROWWISE, EmbOptimType.ADAM)


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


def measured_and_estimated(
    rank: int, world_size: int, cases: list[tuple[str, EmbOptimType]]
) -> list[tuple[str, tuple[float, float], tuple[float, float]]]:
    out = []
    for sharding, optimizer in cases:
        configs = tables()
        model = shard(configs, sharding, optimizer)
        # The plan by hand gives the plain table TorchRec's dense kernel, which nothing steps in backward.
        left = [p for name, p in model.named_parameters() if name.endswith(".plain.weight") and p.numel()]
        dense = torch.optim.Adam(left) if left else None
        train(model, configs, range(1))
        if dense is not None:
            for p in left:
                p.grad = torch.zeros_like(p)
            dense.step()
        collection = CompositionalEmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        fused = {"optimizer": optimizer, "learning_rate": 0.05, "eps": 1e-4}
        sharders = [CompositionalEmbeddingBagCollectionSharder(fused), EmbeddingBagCollectionSharder(fused)]
        hardware = hardware_named("cpu")
        planner = CompositionalEmbeddingShardingPlanner(
            hardware.topology(world_size, int(os.environ["LOCAL_WORLD_SIZE"])),
            hardware=hardware,
            dense_optimizer=torch.optim.Adam,
        )
        plan = ShardingPlan({"": model.plan.plan["ebc"]})
        cost = planner.estimate(plan, collection, sharders)[rank]  # type: ignore[arg-type]
        out.append((f"{sharding} {optimizer}", held(model, dense), (cost.parameters, cost.optimizer)))
        dist.barrier()
    return out


@pytest.mark.parametrize(
    ("world_size", "local_world_size"), [(2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow)]
)
def test_estimated_bytes_are_those_held(world_size: int, local_world_size: int) -> None:
    shardings = SHARDINGS if local_world_size < world_size else [s for s in SHARDINGS if s != "grid_shard"]
    cases = [(sharding, optimizer) for sharding in shardings for optimizer in OPTIMIZERS]
    results = run_ranks(measured_and_estimated, world_size, cases, local_world_size=local_world_size)
    for rank, of_rank in enumerate(results):
        assert len(of_rank) == len(cases)
        for name, (parameters, state), (estimated_parameters, estimated_state) in of_rank:
            where = f"{name} on rank {rank} of {world_size}"
            assert estimated_parameters == pytest.approx(parameters, rel=0.01), where
            assert estimated_state == pytest.approx(state, rel=0.01), where
