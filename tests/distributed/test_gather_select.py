"""``use_gather_select`` of a collection without pooling: another way to the same embeddings of ids that occur often."""

import inspect
from typing import Any

import pytest
import torch
from global_batches import batch_of
from placements import BASIC_SHARDINGS, placements, plan_of
from ranks import own_device, run_ranks
from sharded_model import ADAGRAD, LR, NUM_IDS, Model, sequences, steps_of, weights_of
from torch import Tensor
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import CompositionalEmbeddingCollection
from torchrec_qr.distributed import CompositionalEmbeddingCollectionSharder

BY_SORTING = hasattr(EmbeddingCollection, "set_use_sorted_select")
PER_SHARDING = "use_gather_select_per_sharding" in inspect.signature(EmbeddingCollection).parameters


def test_the_collection_has_torchrecs_options() -> None:
    kept = {"row_wise": True}
    table = sequences()
    collection = CompositionalEmbeddingCollection([table], torch.device("meta"), False, True, kept)
    assert (collection.use_gather_select(), collection.use_gather_select_per_sharding()) == (True, kept)
    collection = CompositionalEmbeddingCollection([table], torch.device("meta"))
    assert (collection.use_gather_select(), collection.use_gather_select_per_sharding()) == (False, None)
    assert not collection.use_sorted_select()
    collection.set_use_sorted_select(True)
    assert collection.use_sorted_select()


def trained(
    sharding: str, options: dict[str, Any], by_sorting: bool = False
) -> tuple[list[Tensor], dict[str, Tensor], set[str]]:
    """Outputs and values after two steps, and which of torch's two functions looked embeddings up."""
    compositional = [sequences(name) for name in ("a", "b")]
    plain: Any = EmbeddingConfig(name="plain", feature_names=["f_plain"], num_embeddings=NUM_IDS, embedding_dim=8)
    configs: list[Any] = [*compositional, plain]
    collection = CompositionalEmbeddingCollection(configs, torch.device("meta"), **options)
    collection.set_use_sorted_select(by_sorting)
    fused = {"optimizer": ADAGRAD, "learning_rate": LR}
    sharder = CompositionalEmbeddingCollectionSharder(fused, use_index_dedup=True)
    generators = placements(compositional, sharding) | {"plain": table_wise(rank=0, compute_kernel="fused")}
    plan = ShardingPlan({"collection": plan_of(collection, generators, sharder)})
    torch.manual_seed(0)
    model = DistributedModelParallel(Model(collection), device=own_device(), plan=plan, sharders=[sharder])
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = [batch_of(configs, step, rank, world_size) for step in range(2)]
    with torch.profiler.profile() as profile:
        outputs = list(steps_of(model, batches))
    used = {e.name for e in profile.events()} & {"aten::gather_backward", "GatherBackward0", "IndexSelectBackward0"}
    return outputs, weights_of(model), used


def same(rank: int, world_size: int) -> None:
    for sharding in BASIC_SHARDINGS:
        expected, values, used = trained(sharding, {})
        assert "GatherBackward0" not in used
        options: list[dict[str, Any]] = [{"use_gather_select": True}]
        if PER_SHARDING:
            options.append({"use_gather_select_per_sharding": dict.fromkeys([sharding, "table_wise"], True)})
        if BY_SORTING:
            actual, own, used = trained(sharding, {}, by_sorting=True)
            assert not used & {"GatherBackward0", "IndexSelectBackward0"}
            assert all(map(torch.equal, actual[:1], expected[:1]))
            for name, value in values.items():
                torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-6)
        for chosen in options:
            actual, own, used = trained(sharding, chosen)
            assert "GatherBackward0" in used, (sharding, chosen)
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a, e)
            for name, value in values.items():
                torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world_size", [2])
def test_a_sharded_collection_gathers_the_same_embeddings(world_size: int) -> None:
    run_ranks(same, world_size)
