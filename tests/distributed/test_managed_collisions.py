"""TorchRec's managed collisions (ZCH) in front of a sharded collection: their slots are ids of compositional tables."""

import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import randomize
from pieces import numpy_of
from ranks import run_ranks
from sharded_model import DIM, LR, NUM_IDS, SGD, plain_named, table, weights_of
from single_tables import collection_of, sequence_table
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.mc_embeddingbag import ShardedManagedCollisionEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import Awaitable, ShardingPlan
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import LFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule

from torchrec_qr import ExplicitPartitions, HashPartition, MixedRadix, QuotientRemainder
from torchrec_qr.distributed import get_default_sharders
from torchrec_qr.distributed.inner_collections import ManagedCollisionBagSharder, ManagedCollisionSequenceSharder
from torchrec_qr.distributed.layout import RowCode
from torchrec_qr.distributed.managed_collisions import slot_blocks

CPU = torch.device("cpu")
RAW_IDS = 10**6
STRIDED, ADJACENT = QuotientRemainder(num_collisions=7), QuotientRemainder(num_collisions=7, grouping="adjacent")
TABLES = [
    table("strided", STRIDED, "mult"),
    table("adjacent", ADJACENT, "add", pooling=PoolingType.MEAN),
    table("three", MixedRadix(sizes=[3, 7, 3]), "mult"),
]


def managed(configs: list[Any], inside: Any, remapped: bool = True, buckets: int = 1, hashed: bool = False) -> Any:
    """The managed collisions of each table, sorted (MCH) or hashed (MPZCH), with as many slots as it has ids."""
    modules: dict[str, Any] = {
        c.name: HashZchManagedCollisionModule(
            zch_size=c.num_embeddings, device=CPU, total_num_buckets=buckets, input_hash_size=0, max_probe=8
        )
        if hashed
        else MCHManagedCollisionModule(
            zch_size=c.num_embeddings,
            device=CPU,
            eviction_policy=LFU_EvictionPolicy(),
            eviction_interval=2,
            input_hash_size=RAW_IDS,
            buckets=buckets,
        )
        for c in configs
    }
    pooled = hasattr(inside, "embedding_bag_configs")
    kind = ManagedCollisionEmbeddingBagCollection if pooled else ManagedCollisionEmbeddingCollection
    return kind(inside, ManagedCollisionCollection(modules, configs), remapped)


def sharded(module: Any, sharder: Any, **kinds: Any) -> DistributedModelParallel:
    inside = module._embedding_module
    generators = {c.name: kinds.get(c.name, row_wise()) for c in inside.embedding_configs()}
    plan = construct_module_sharding_plan(
        module, generators, sharder, dist.get_world_size(), dist.get_world_size(), "cpu"
    )
    for of_table in plan.values():
        of_table.compute_kernel = "fused"
    return DistributedModelParallel(Outer(module), device=CPU, plan=ShardingPlan({"managed": plan}), sharders=[sharder])


class Outer(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.managed = module

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, KeyedJaggedTensor]:
        out, remapped = self.managed(features)
        return values_of(waited(out)), waited(remapped)


def waited(out: Any) -> Any:
    return out.wait() if isinstance(out, Awaitable) else out


def values_of(out: Any) -> Tensor:
    if isinstance(out, KeyedTensor):
        return torch.cat([out[key] for key in sorted(out.keys())], dim=1)
    return torch.cat([out[key].values().reshape(-1) for key in sorted(out)])


def loss_of(out: Tensor) -> Tensor:
    return 0.01 * (out * (out - 1)).sum()


def raw_batch(configs: list[Any], step: int, rank: int) -> KeyedJaggedTensor:
    """Ids of a window that moves, so that all tables see more than they have slots for."""
    rng = random.Random(f"{step} {rank}")
    bags = [
        [7919 * rng.randrange(12 * step, 40 + 12 * step) % RAW_IDS for _ in range(rng.randrange(4))] for _ in range(15)
    ]
    return KeyedJaggedTensor(
        keys=[f"f_{c.name}" for c in configs],
        values=torch.tensor([x for _ in configs for bag in bags for x in bag]),
        lengths=torch.tensor([len(bag) for _ in configs for bag in bags]),
    )


def tables_of(pooled: bool) -> list[Any]:
    if pooled:
        return TABLES
    return [
        sequence_table(p, name=n, num_embeddings=NUM_IDS) for n, p in (("strided", STRIDED), ("adjacent", ADJACENT))
    ]


def sharder_of(pooled: bool) -> Any:
    fused_params = {"optimizer": SGD, "learning_rate": LR}
    return (ManagedCollisionBagSharder if pooled else ManagedCollisionSequenceSharder)(fused_params=fused_params)


def slots_of(batch: KeyedJaggedTensor, remapped: KeyedJaggedTensor) -> dict[tuple[str, int], int]:
    """The slot of each raw id of a feature."""
    slots: dict[tuple[str, int], int] = {}
    for key in list(batch.keys()):
        for raw, slot in zip(batch[key].values().tolist(), remapped[key].values().tolist(), strict=True):
            assert slots.setdefault((key, raw), slot) == slot
    return slots


def train(rank: int, world_size: int, pooled: bool) -> list[dict[tuple[str, int], int]]:
    """Trains beside the unsharded collection, which gets the slots as ids. Returns the slots of each step."""
    configs = tables_of(pooled)
    alone = collection_of(configs)
    randomize(alone, 3)
    model, reloaded = (sharded(managed(configs, collection_of(configs, "meta")), sharder_of(pooled)) for _ in range(2))
    of_alone = {f"managed._embedding_module.{name}": value.clone() for name, value in alone.state_dict().items()}
    model.load_state_dict(model.state_dict() | of_alone)
    optimizer = torch.optim.SGD(alone.parameters(), lr=LR)
    slots = []
    for step in range(9):
        batch = raw_batch(configs, step, rank)
        out, remapped = model(batch)
        slots.append(slots_of(batch, remapped))
        everywhere: list[Any] = [None] * world_size
        parts = {
            key: (numpy_of(remapped[key].values()), numpy_of(remapped[key].lengths())) for key in list(batch.keys())
        }
        dist.all_gather_object(everywhere, parts)
        expected = [values_of(alone(batch_of_parts(part))) for part in everywhere]
        torch.testing.assert_close(out, expected[rank], rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        torch.stack([loss_of(e) for e in expected]).sum().backward()
        optimizer.step()
        (world_size * loss_of(out)).backward()
    found = weights_of(model)
    for name, value in alone.state_dict().items():
        if not name.endswith("fingerprint"):
            torch.testing.assert_close(
                found[f"managed._embedding_module.{name}"],
                value,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    # A state dict has the slots too, and not what is counted since the last eviction.
    reloaded.load_state_dict(model.state_dict())
    for evaluated in (model, reloaded):
        evaluated.eval()
    last = raw_batch(configs, 8, rank)
    (out, remapped), (again, remapped_again) = model(last), reloaded(last)
    torch.testing.assert_close(out, again)
    assert slots_of(last, remapped) == slots_of(last, remapped_again)
    return slots


def batch_of_parts(parts: dict[str, Any]) -> KeyedJaggedTensor:
    values, lengths = zip(*parts.values(), strict=True)
    return KeyedJaggedTensor(
        keys=list(parts),
        values=torch.cat([torch.from_numpy(v) for v in values]),
        lengths=torch.cat([torch.from_numpy(n) for n in lengths]),
    )


@pytest.mark.parametrize("pooled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_trains_as_the_unsharded_collection_does_on_the_slots(pooled: bool) -> None:
    ranks = run_ranks(train, 2, pooled)
    owners: dict[tuple[str, int], set[int]] = {}
    shared: dict[str, set[int]] = {}
    for of_ranks in zip(*ranks, strict=True):
        slots = of_ranks[0] | of_ranks[1]
        assert all(slots[key] == slot for of_rank in of_ranks for key, slot in of_rank.items())
        for (feature, raw), slot in slots.items():
            owners.setdefault((feature, slot), set()).add(raw)
            if sum(own == slot for (of, _), own in slots.items() if of == feature) > 1:
                shared.setdefault(feature, set()).add(slot)
    for config in tables_of(pooled):
        (feature,) = config.feature_names
        own = {slot for of, slot in owners if of == feature}
        assert 0 <= min(own) < max(own) < config.num_embeddings
        # Ids without a slot share the last one of a rank, and other slots have one id at a time.
        assert len(shared[feature]) <= 2
        assert any(len(raw) > 1 for (of, slot), raw in owners.items() if of == feature and slot not in shared[feature])


def hashed_slots(rank: int, world_size: int) -> list[int]:
    # Ten base rows of six ids each, so that ranks end with a bucket.
    config = table("hashed", QuotientRemainder(num_collisions=6), "mult")
    alone = collection_of([config])
    randomize(alone, 3)
    model = sharded(managed([config], collection_of([config], "meta"), True, world_size, True), sharder_of(True))
    of_alone = {f"managed._embedding_module.{name}": value.clone() for name, value in alone.state_dict().items()}
    model.load_state_dict(model.state_dict() | of_alone)
    model.eval()
    out, remapped = model(raw_batch([config], 0, rank))
    torch.testing.assert_close(out, values_of(alone(remapped)))
    return [int(slot) for slot in remapped.values()]


@pytest.mark.slow
def test_hashed_slots_are_looked_up() -> None:
    """TorchRec's MPZCH, which only looks up on a CPU: each raw id has the slot that it is hashed to."""
    slots = {slot for of_rank in run_ranks(hashed_slots, 2) for slot in of_rank}
    assert len(slots) > 15
    assert 0 <= min(slots) < 30 <= max(slots) < NUM_IDS


def shared_bags(rank: int, world_size: int) -> None:
    """Bags that samples share, of mean and of sum, are those of a batch of samples."""
    models = [sharded(managed(TABLES, collection_of(TABLES), False), sharder_of(True)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    keys = [f"f_{config.name}" for config in TABLES]
    for step in range(3):
        bags = [[1000 * step + 7, 5], [3], []][: 2 + rank]
        of_samples = [1, 0, 1]
        variable = KeyedJaggedTensor(
            keys=keys,
            values=torch.tensor([*bags[0], *(x for _ in keys[1:] for bag in bags for x in bag)]),
            lengths=torch.tensor([len(bags[0]), *(len(bag) for _ in keys[1:] for bag in bags)]),
            stride_per_key_per_rank=[[1], *([len(bags)] for _ in keys[1:])],
            inverse_indices=(keys, torch.tensor([[0, 0, 0], *(of_samples for _ in keys[1:])])),
        )
        samples = [bags[0]] * 3 + [bags[b] for _ in keys[1:] for b in of_samples]
        plain = KeyedJaggedTensor(
            keys=keys,
            values=torch.tensor([x for bag in samples for x in bag]),
            lengths=torch.tensor([len(bag) for bag in samples]),
        )
        # Other counts of the same ids may give other slots, so that only the first step has none.
        out, expected = models[0](variable)[0], models[1](plain)[0]
        assert out.shape == expected.shape
        if step == 0:
            torch.testing.assert_close(out, expected)
    with pytest.raises(NotImplementedError, match="inverse indices with return_remapped_features=True"):
        sharded(managed(TABLES, collection_of(TABLES)), sharder_of(True))(variable)


@pytest.mark.slow
def test_samples_share_bags() -> None:
    run_ranks(shared_bags, 2)


def alike(rank: int, world_size: int, pooled: bool) -> None:
    """On one rank the slots are those of the unsharded module, evictions included."""
    configs = tables_of(pooled)
    alone = managed(configs, collection_of(configs))
    randomize(alone._embedding_module, 3)
    model = sharded(managed(configs, collection_of(configs, "meta")), sharder_of(pooled))
    of_alone = {f"managed.{name}": v.clone() for name, v in alone.state_dict().items() if "_embedding_module" in name}
    model.load_state_dict(model.state_dict() | of_alone)
    for step in range(9):
        batch = raw_batch(configs, step, rank)
        (out, remapped), (own, own_remapped) = model(batch), Outer(alone)(batch)
        assert slots_of(batch, remapped) == slots_of(batch, own_remapped)
        torch.testing.assert_close(out, own)
    narrow = KeyedJaggedTensor(batch.keys(), batch.values().int(), lengths=batch.lengths())
    with pytest.raises(TypeError, match=r"tables \['strided', .*'f_strided'.*: ids have dtype torch.int32; allowed"):
        model(narrow)


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [True, False])
def test_slots_of_one_rank_are_those_of_the_unsharded_module(pooled: bool) -> None:
    run_ranks(alike, 1, pooled)


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.name)
def test_slots_of_all_ranks_are_all_ids(config: Any) -> None:
    for num_ranks in (1, 2, 3):
        blocks = slot_blocks(config, num_ranks)
        codes = [block.codes_of(torch.arange(block.num_slots)) for block in blocks]
        ids = torch.cat([block.ids_of(own) for block, own in zip(blocks, codes, strict=True)])
        assert sorted(ids.tolist()) == list(range(config.num_embeddings))
        for block, own in zip(blocks, codes, strict=True):
            # The codes that the ids have if the input dist sends them.
            sent = RowCode(config).encode(block.ids_of(own), None)
            assert torch.equal(sent - block.first_row * RowCode(config).codes_per_row, own)


def beside_a_plain_table(rank: int, world_size: int) -> None:
    """TorchRec resets the rows of a plain table, as in a collection of its own."""
    plain = plain_named("plain")
    plain.init_fn = partial(nn.init.constant_, val=0.5)
    ours = managed([TABLES[0], plain], collection_of([TABLES[0], plain]), False)
    inside = EmbeddingBagCollection(tables=[plain])
    inside.embedding_configs = inside.embedding_bag_configs
    stock = managed([plain], inside, False)
    fused_params = {"optimizer": SGD, "learning_rate": LR}
    # Our sharder takes TorchRec's own collection too.
    both = [sharded(module, ManagedCollisionBagSharder(fused_params=fused_params)) for module in (ours, stock)]
    assert type(both[1].module.managed) is ShardedManagedCollisionEmbeddingBagCollection
    for step in range(9):
        batch = raw_batch([TABLES[0], plain], step, rank)
        out, expected = both[0](batch)[0], both[1](batch)[0]
        own = out[:, : expected.shape[1]]
        torch.testing.assert_close(own, expected)
        for value in (own, expected):
            loss_of(value).backward()
    a, b = (weights_of(model) for model in both)
    key = "managed._embedding_module.embedding_bags.plain.weight"
    torch.testing.assert_close(a[key], b[key])
    assert (a[key] != 0.5).any()


@pytest.mark.slow
def test_plain_tables_are_reset_as_by_torchrec() -> None:
    run_ranks(beside_a_plain_table, 2)


def refused(rank: int, world_size: int) -> None:
    def shard(config: Any, **kinds: Any) -> None:
        sharded(managed([config], collection_of([config], "meta")), ManagedCollisionBagSharder(), **kinds)

    with pytest.raises(NotImplementedError, match=r"table 'strided': managed collisions of a table_wise .*id_hash"):
        shard(TABLES[0], strided=table_wise(rank=0))
    with pytest.raises(NotImplementedError, match="table 'e': managed collisions of ExplicitPartitions"):
        shard(table("e", ExplicitPartitions(torch.arange(NUM_IDS).unsqueeze(0)), "mult"))
    with pytest.raises(NotImplementedError, match="table 'h': id_hash='splitmix64' behind sharded managed collisions"):
        shard(table("h", STRIDED, "mult", id_hash="splitmix64"))
    config = table("b", STRIDED, "mult")
    with pytest.raises(
        ValueError, match=r"table 'b': the slots of the ranks end at \[35, 60\], and the buckets .* at \[30, 60\]"
    ):
        sharded(managed([config], collection_of([config], "meta"), True, 2, True), ManagedCollisionBagSharder())
    with pytest.raises(ValueError, match=r"table 'one': its base partition has 1 rows, .* \[60, 0\] slots"):
        shard(table("one", HashPartition(rows=1), "mult"))


def test_tables_without_slots_for_all_ranks_are_refused_by_name() -> None:
    run_ranks(refused, 2)


def planned(rank: int, world_size: int) -> list[str]:
    model = DistributedModelParallel(
        # TorchRec's planner requires a bucket for each rank.
        Outer(managed(TABLES, collection_of(TABLES, "meta"), buckets=world_size)),
        device=CPU,
        sharders=get_default_sharders(),
    )
    out, remapped = model(raw_batch(TABLES, 0, rank))
    assert out.shape == (15, len(TABLES) * DIM)
    assert int(remapped.values().max()) < NUM_IDS
    plan: Any = model.plan.plan["managed"]
    return sorted({sharding.sharding_type for sharding in plan.values()})


@pytest.mark.slow
def test_the_default_sharders_and_the_planner_take_them() -> None:
    assert run_ranks(planned, 2) == [["row_wise"]] * 2
