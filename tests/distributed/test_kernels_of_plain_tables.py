"""The compute kernels of plain tables in our collections are those of TorchRec's, in plans by hand and by planners.

On a CPU, FBGEMM keeps the rows of ``fused_uvm`` and ``fused_uvm_caching`` in the same memory as those of ``fused``.
"""

from typing import Any

import pytest
import torch
from global_batches import batch_of
from placements import plan_of
from ranks import own_device, run_ranks
from sharded_model import ADAGRAD, LR, NUM_IDS, Model, plain_named, sequences, sharders_of, steps_of, table, weights_of
from single_tables import collection_of
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.sharding_plan import table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import QuotientRemainder
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

FUSED_PARAMS = {"optimizer": ADAGRAD, "learning_rate": LR}
OF_MEMORY = ("fused", "fused_uvm", "fused_uvm_caching")
META = torch.device("meta")


def plain(pooled: bool) -> Any:
    if pooled:
        return plain_named("p")
    return EmbeddingConfig(name="p", feature_names=["f_p"], num_embeddings=NUM_IDS, embedding_dim=8)


def theirs(pooled: bool) -> tuple[Any, Any]:
    if pooled:
        return EmbeddingBagCollection([plain(True)], device=META), EmbeddingBagCollectionSharder(FUSED_PARAMS)
    return EmbeddingCollection([plain(False)], device=META), EmbeddingCollectionSharder(FUSED_PARAMS)


def ours(tables: list[Any]) -> tuple[Any, Any]:
    collection = collection_of(tables, META)
    return collection, next(s for s in sharders_of(FUSED_PARAMS) if s.module_type is type(collection))


def values_after(collection: Any, sharder: Any, kernel: str, batches: list[Any]) -> list[Tensor]:
    """All outputs of three steps, and the values then, the plain table's first."""
    generators = {"p": table_wise(rank=0, compute_kernel=kernel)}
    if "a" in sharder.shardable_parameters(collection):
        generators["a"] = table_wise(rank=0, compute_kernel="fused")
    plan = ShardingPlan({"collection": plan_of(collection, generators, sharder)})
    torch.manual_seed(0)
    model = DistributedModelParallel(Model(collection), device=own_device(), plan=plan, sharders=[sharder])
    outputs = [out.flatten() for out in steps_of(model, batches)]
    values = sorted(weights_of(model).items(), key=lambda item: (not item[0].endswith("p.weight"), item[0]))
    return [values[0][1], torch.cat(outputs), *(value for _, value in values[1:])]


def trained(rank: int, world_size: int, pooled: bool) -> None:
    """Plain tables alone train as TorchRec's, bit for bit, and beside a compositional table as with ``fused``."""
    compositional = table("a", QuotientRemainder(num_collisions=7), "mult") if pooled else sequences("a")
    batches = [batch_of([compositional, plain(pooled)], step, rank, world_size) for step in range(3)]
    both = values_after(*ours([plain(pooled), compositional]), "fused", batches)
    for kernel in OF_MEMORY:
        expected, alone, beside = (
            values_after(*made, kernel, batches)
            for made in (theirs(pooled), ours([plain(pooled)]), ours([plain(pooled), compositional]))
        )
        assert all(torch.equal(a, e) for a, e in zip(alone, expected, strict=True))
        assert all(torch.equal(a, e) for a, e in zip(beside, both, strict=True))
        assert torch.equal(beside[0], expected[0])


@pytest.mark.parametrize("pooled", [True, False])
def test_plain_tables_train_as_torchrecs_with_kernels_of_memory(pooled: bool) -> None:
    run_ranks(trained, 1, pooled)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sharders_offer_torchrecs_kernels_for_plain_tables_alone(pooled: bool, device: str) -> None:
    _, expected = theirs(pooled)
    collection, sharder = ours([plain(pooled)])
    compositional = table("a", QuotientRemainder(num_collisions=7), "mult") if pooled else sequences("a")
    mixed, _ = ours([plain(pooled), compositional])
    for kind in sharder.sharding_types(device):
        alone = ["dense"] if kind == "data_parallel" else ["fused"]
        for _ in range(2):
            sharder.shardable_parameters(collection)
            assert sharder.compute_kernels(kind, device) == expected.compute_kernels(kind, device)
            sharder.shardable_parameters(mixed)
            assert sharder.compute_kernels(kind, device) == alone


def topology() -> Topology:
    return Topology(world_size=2, compute_device="cuda", hbm_cap=2**34, ddr_cap=2**37)


def planned(tables: list[Any], planner: Any) -> dict[str, str]:
    collection, sharder = ours(tables)
    plan = planner.plan(Model(collection), [sharder]).plan["collection"]
    return {name: sharding.compute_kernel for name, sharding in plan.items()}


@pytest.mark.parametrize("kernel", OF_MEMORY)
def test_planners_choose_the_kernel_that_constraints_require(kernel: str) -> None:
    constraints = {"p": ParameterConstraints(sharding_types=["table_wise"], compute_kernels=[kernel])}
    reservation = FixedPercentageStorageReservation(percentage=0.1)
    stock = EmbeddingShardingPlanner(topology(), constraints=constraints, storage_reservation=reservation)
    assert planned([plain(True)], stock) == {"p": kernel}
    own = CompositionalEmbeddingShardingPlanner(hardware_named("h100").topology(2), constraints=constraints)
    compositional = table("a", QuotientRemainder(num_collisions=7), "mult")
    both = planned([plain(True), compositional], own)
    assert both["p"] == kernel
    assert EmbeddingComputeKernel(both["a"]).value in ("fused", "dense")
