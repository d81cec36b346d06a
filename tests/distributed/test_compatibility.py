"""What stands beside the collections in TorchRec works, or is refused by name: see `docs/compatibility.md`."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from assert_all_close import assert_all_close
from global_batches import batch_of
from placements import BASIC_SHARDINGS, placements, plan_of
from ranks import run_ranks
from sharded_model import (
    NUM_IDS,
    SGD,
    plain_named,
    sequences,
    shard,
    tables,
    train,
    two_tables,
    unsharded,
    weights_of,
)
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import LFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_qr import (
    CompositionalEmbeddingBagCollection,
    CompositionalEmbeddingCollection,
)
from torchrec_qr.distributed import CompositionalEmbeddingBagCollectionSharder, get_default_sharders

CPU = torch.device("cpu")
LR = 0.05
TABLES = two_tables()


# --- managed collisions (ZCH) --------------------------------------------------------------------------------------


def remapping(collection: Any, configs: list[Any]) -> ManagedCollisionCollection:
    """Ids of a wide space into the tables' own, for each table."""
    modules: dict[str, Any] = {
        c.name: MCHManagedCollisionModule(
            zch_size=c.num_embeddings,
            device=CPU,
            eviction_policy=LFU_EvictionPolicy(),
            eviction_interval=1,
            input_hash_size=10**6,
        )
        for c in configs
    }
    return ManagedCollisionCollection(modules, collection.embedding_configs())


def managed(pooled: bool) -> ManagedCollisionEmbeddingBagCollection | ManagedCollisionEmbeddingCollection:
    inside: Any
    if pooled:
        inside = CompositionalEmbeddingBagCollection(tables=list(TABLES))
        return ManagedCollisionEmbeddingBagCollection(inside, remapping(inside, list(TABLES)), True)
    of_sequences = [sequences(c.name) for c in TABLES]
    inside = CompositionalEmbeddingCollection(tables=of_sequences)
    return ManagedCollisionEmbeddingCollection(inside, remapping(inside, of_sequences), True)


@pytest.mark.parametrize("pooled", [True, False])
def test_managed_collisions_of_an_unsharded_collection(pooled: bool) -> None:
    """The collection sees the ids that its slots were given: those of the remapped features."""
    module = managed(pooled)
    wide = torch.tensor([987_654, 3, 987_654, 500_000, 3, 42])
    batch = KeyedJaggedTensor(["f_a", "f_b"], wide, lengths=torch.tensor([2, 1, 2, 1]))
    for _ in range(3):
        out, remapped = module(batch)
    assert isinstance(remapped, KeyedJaggedTensor)
    ids = remapped.values().tolist()
    assert ids != wide.tolist()
    assert max(ids) < NUM_IDS
    # One slot an id and table.
    assert (ids[0] == ids[2], ids[0] == ids[1], len({ids[3], ids[4], ids[5]})) == (True, False, 3)
    expected = module._embedding_module(remapped)
    for name in ("f_a", "f_b"):
        actual, own = (o[name] if pooled else o[name].values() for o in (out, expected))
        assert actual.numel()
        assert torch.equal(actual, own)


# --- feature processors --------------------------------------------------------------------------------------------


class Processed(nn.Module):
    """Position-weighted features in front of a collection, its outputs in the order of the tables."""

    def __init__(self, collection: Any, device: torch.device, as_collection: bool = True) -> None:
        super().__init__()
        self.features = [f for t in collection.embedding_bag_configs() for f in t.feature_names]
        processors: Any
        if as_collection:
            processors = PositionWeightedModuleCollection(dict.fromkeys(self.features, 5), device=device)
        else:
            processors = {f: PositionWeightedModule(5, device=device) for f in self.features}
        self.fp = FeatureProcessedEmbeddingBagCollection(collection, processors)

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        return KeyedTensor.regroup([self.fp(batch)], [self.features])[0]


def processed(configs: list[Any], device: str, as_collection: bool = True) -> Processed:
    collection = CompositionalEmbeddingBagCollection(tables=configs, device=torch.device(device), is_weighted=True)
    return Processed(collection, torch.device(device), as_collection)


def loss_of(out: Tensor) -> Tensor:
    return (out * (out - 1)).mean()


def train_processed(rank: int, world_size: int, shardings: tuple[str, ...], as_collection: bool) -> None:
    """Three steps of SGD of tables, fused, and of position weights, dense, beside those of the unsharded module."""
    configs = tables()
    for sharding in shardings:
        alone = processed(configs, "cpu", as_collection)
        values = unsharded(configs).state_dict()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in alone.named_parameters():
                inside = name.replace("fp._embedding_bag_collection", "collection")
                p.copy_(values[inside] if inside in values else torch.rand(p.shape, generator=generator) + 0.5)
        sharder = CompositionalEmbeddingBagCollectionSharder(fused_params={"optimizer": SGD, "learning_rate": LR})
        model = processed(configs, "meta", as_collection)
        plan = plan_of(model.fp._embedding_bag_collection, placements(configs, sharding), sharder)
        sharded = DistributedModelParallel(
            model,
            device=CPU,
            plan=ShardingPlan({"fp": plan}),
            sharders=[FeatureProcessedEmbeddingBagCollectionSharder(ebc_sharder=sharder)],
        )
        sharded.load_state_dict({name: value.clone() for name, value in alone.state_dict().items()})
        rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))  # position weights, and the plain table
        dense = torch.optim.SGD(rest.values(), lr=LR)
        everything = torch.optim.SGD(alone.parameters(), lr=LR)
        for step in range(3):
            batches = [batch_of(configs, step, r, world_size, weighted=True) for r in range(world_size)]
            everything.zero_grad()
            dense.zero_grad()
            # Copies: TorchRec's processors write positions into the batch where rows are split.
            expected = [alone(copy.deepcopy(batch)) for batch in batches]
            out = sharded(copy.deepcopy(batches[rank]))
            torch.testing.assert_close(out, expected[rank], rtol=1e-4, atol=1e-4, msg=lambda m, s=sharding: f"{s}: {m}")
            loss_of(out).backward()
            torch.stack([loss_of(e) for e in expected]).mean().backward()
            everything.step()
            dense.step()
        assert_all_close(weights_of(sharded), alone.state_dict(), sharding, 1e-4, 1e-4, of_half=5e-3)


@pytest.mark.parametrize(
    ("world_size", "as_collection", "shardings"),
    [
        (2, True, BASIC_SHARDINGS),
        (2, False, ("table_wise", "row_wise")),
        (4, True, ("table_row_wise", "grid_shard")),
    ],
)
def test_feature_processors_train_as_unsharded(
    world_size: int, as_collection: bool, shardings: tuple[str, ...]
) -> None:
    run_ranks(train_processed, world_size, shardings, as_collection, local_world_size=2)


def default_processed(rank: int, world_size: int) -> tuple[list[str], list[float]]:
    """Tables that the planner places, behind a processor; and TorchRec's own collection in the same place."""
    torch.manual_seed(0)  # the same values on all ranks
    alone = processed(list(TABLES), "cpu")
    model = DistributedModelParallel(processed(list(TABLES), "meta"), device=CPU, sharders=get_default_sharders())
    model.load_state_dict({name: value.clone() for name, value in alone.state_dict().items()})
    batch = batch_of(list(TABLES), 0, rank, world_size, weighted=True)
    torch.testing.assert_close(model(copy.deepcopy(batch)), alone(batch), rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    stock = EmbeddingBagCollection(
        tables=[replace(plain_named("p"), feature_names=["f_a"])],
        is_weighted=True,
    )
    plain = Processed(stock, CPU)
    expected = plain(copy.deepcopy(batch))
    values = {name: value.clone() for name, value in plain.state_dict().items()}
    sharded = DistributedModelParallel(plain, device=CPU, sharders=get_default_sharders())
    sharded.load_state_dict(values)
    torch.testing.assert_close(sharded(batch), expected, rtol=1e-5, atol=1e-6)
    return sorted(model.plan.plan["fp"]), [float(expected.detach().abs().sum())]


def test_the_default_sharders_take_feature_processors_of_either_collection() -> None:
    for names, (total,) in run_ranks(default_processed, 2):
        assert names == ["a", "b"]
        assert total > 0


# --- torch.compile -------------------------------------------------------------------------------------------------


def compiled(rank: int, world_size: int) -> None:
    configs = tables()[:1]
    values = unsharded(configs)
    eager, traced = (shard(configs, "row_wise", values=values) for _ in range(2))
    expected = train(eager, configs, range(2))
    out = train(torch.compile(traced, backend="aot_eager"), configs, range(2))
    assert not torch.equal(expected[0], expected[1])
    for step, (a, e) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(a, e), step
    assert_all_close(weights_of(traced), weights_of(eager))


@pytest.mark.xfail(
    torch.__version__.startswith("2.11."),
    reason="compiled, TorchRec's own row-wise input dist fails with torch 2.11 in AOTAutograd (maybe_mark_dynamic)",
)
@pytest.mark.slow
def test_a_compiled_model_trains_as_the_eager_one() -> None:
    """With replicated partitions, their hook and codes of rows; compiling is slow, of TorchRec's own tables too."""
    run_ranks(compiled, 2, timeout=280, alone=True)
