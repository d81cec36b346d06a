"""A model in groups of ranks: groups of another size for one collection, plans by the planners, TorchRec's modules."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from global_batches import batch_of, global_batch
from groups_of_ranks import GROUP_SIZE, Groups, place_of
from placements import SHARDING_GROUP, placements, plan_of
from ranks import own_device, run_ranks
from sharded_model import ADAGRAD, EPS, LR, Model, own_state, own_weights, sequences, sharders_of, table, unsharded
from single_tables import collection_of
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import DMPCollectionConfig, EmbeddingModuleShardingPlan, ShardingPlan
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import LFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule

from torchrec_qr import CompositionalEmbeddingCollection, QuotientRemainder
from torchrec_qr.distributed.inner_collections import ManagedCollisionBagSharder
from torchrec_qr.planner import CompositionalEmbeddingShardingPlanner, hardware_named

FUSED = {"optimizer": ADAGRAD, "learning_rate": LR, "eps": EPS}


class Both(nn.Module):
    """A collection of bags and one of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = Model(collection_of(BAGS, "meta"))
        self.sequences = Model(collection_of([SEQUENCES], "meta"))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return torch.cat([self.bags(features).reshape(-1), self.sequences(features).reshape(-1)])


BAGS = [
    table("rw", QuotientRemainder(num_collisions=7), "mult"),
    table("cw", QuotientRemainder(num_collisions=5), "add"),
]
SEQUENCES = sequences()


def as_trained(plan: EmbeddingModuleShardingPlan) -> EmbeddingModuleShardingPlan:
    for of_table in plan.values():
        of_table.compute_kernel = "dense" if of_table.sharding_type == "data_parallel" else "fused"
    return plan


def two_sizes(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Trains bags in groups of two ranks and sequences in groups of one; returns values around the average."""
    model, sharders = Both(), sharders_of(FUSED)
    os.environ[SHARDING_GROUP] = "2"
    bags = plan_of(model.bags.collection, placements(BAGS, {"rw": "row_wise", "cw": "column_wise"}), sharders[0])
    os.environ[SHARDING_GROUP] = "1"
    alone = plan_of(model.sequences.collection, placements([SEQUENCES], "table_wise"), sharders[1])
    assert dist.group.WORLD is not None
    dmp = Groups(
        model,
        own_device(),
        ShardingPlan({"bags.collection": as_trained(bags)}),
        world_size,
        GROUP_SIZE,
        dist.group.WORLD,
        sharders=sharders,
        node_group_size=1,
        submodule_configs=[
            DMPCollectionConfig(
                CompositionalEmbeddingCollection, ShardingPlan({"sequences.collection": as_trained(alone)}), 1
            )
        ],
    )
    values = []
    for step in range(2):
        dmp(global_batch([*BAGS, SEQUENCES], 3 + 4 * step + rank).kjt()).square().sum().backward()
        for averaged in (False, True):
            if averaged:
                dmp.sync()
            values.append(own_weights(dmp) | own_state(dmp))
    return values


@pytest.mark.slow
def test_a_collection_may_have_groups_of_another_size() -> None:
    of_ranks = run_ranks(two_sizes, 4, local_world_size=1)
    groups = {"bags": [[0, 1], [2, 3]], "sequences": [[0, 1, 2, 3]]}
    assert {key.split(".")[0] for key in of_ranks[0][0]} == set(groups)
    for before, after in zip(of_ranks[0][0::2], of_ranks[0][1::2], strict=True):
        assert before.keys() == after.keys()
    for step in (0, 2):
        for part, of_part in groups.items():
            for replicas in of_part:
                for key in (key for key in of_ranks[replicas[0]][step] if key.startswith(part)):
                    apart = [of_ranks[r][step][key] for r in replicas]
                    averaged = [of_ranks[r][step + 1][key] for r in replicas]
                    for i, (_, offsets, value) in enumerate(apart[0]):
                        mean = sum(pieces[i][2] for pieces in apart) / len(replicas)
                        assert any((pieces[i][2] != value).any() for pieces in apart), key
                        for pieces in averaged:
                            assert pieces[i][1] == offsets
                            torch.testing.assert_close(pieces[i][2], mean, rtol=1e-6, atol=1e-7, msg=key)


def planned(rank: int, world_size: int, ours: bool) -> set[str]:
    """A plan for the ranks of a group carries the model; the sharded output is the unsharded one."""
    configs = [table(f"t{i}", QuotientRemainder(num_collisions=m), "mult") for i, m in enumerate((2, 7, 30))]
    sharders, model = sharders_of(FUSED), Model(collection_of(configs, "meta"))
    planner: Any
    if ours:
        cpu = hardware_named("cpu")
        planner = CompositionalEmbeddingShardingPlanner(cpu.topology(GROUP_SIZE, 1), batch_size=4, hardware=cpu)
    else:
        topology = Topology(world_size=GROUP_SIZE, local_world_size=1, compute_device="cpu")
        planner = EmbeddingShardingPlanner(topology=topology)
    assert dist.group.WORLD is not None
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    dmp = Groups(
        model, own_device(), plan, world_size, GROUP_SIZE, dist.group.WORLD, sharders=sharders, node_group_size=1
    )
    values = unsharded(configs)
    own = {k: v.clone() for k, v in values.state_dict().items() if k != "scale"}
    dmp.load_state_dict(own)
    group, own_rank = place_of(dmp)
    batch = batch_of(configs, 3 + group, own_rank, GROUP_SIZE)
    torch.testing.assert_close(dmp(batch), values(batch))
    return {of_table.sharding_type for of_table in dmp.plan.plan["collection"].values()}


@pytest.mark.parametrize("ours", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_planners_plan_for_the_ranks_of_a_group(ours: bool) -> None:
    assert run_ranks(planned, 4, ours, local_world_size=1)[0]


def managed(rank: int, world_size: int) -> str:
    inside = collection_of(BAGS[:1], "meta")
    slots = MCHManagedCollisionModule(
        zch_size=BAGS[0].num_embeddings,
        device=own_device(),
        eviction_policy=LFU_EvictionPolicy(),
        eviction_interval=2,
        input_hash_size=1000,
        buckets=GROUP_SIZE,
    )
    collisions = ManagedCollisionCollection({BAGS[0].name: slots}, BAGS[:1])
    module = ManagedCollisionEmbeddingBagCollection(inside, collisions)
    sharder = ManagedCollisionBagSharder(fused_params=FUSED)
    plan = construct_module_sharding_plan(module, {"rw": row_wise()}, sharder, 1, GROUP_SIZE, "cpu")
    assert dist.group.WORLD is not None
    with pytest.raises(NotImplementedError) as error:
        Groups(
            nn.ModuleDict({"managed": module}),
            own_device(),
            ShardingPlan({"managed": plan}),
            world_size,
            GROUP_SIZE,
            dist.group.WORLD,
            sharders=[sharder],
        )
    return str(error.value)


def test_managed_collisions_are_refused_in_groups() -> None:
    for message in run_ranks(managed, 4, local_world_size=1):
        assert message.startswith("tables ['rw']: managed collisions in front of a compositional collection are not")
