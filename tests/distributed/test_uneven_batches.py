"""The last batch of an epoch: 3 samples on one rank and 1 on the other."""

import copy
from typing import Any

import pytest
import torch
from ranks import run_ranks
from sharded_model import DIM, shard, two_tables, unsharded
from single_tables import collection_of, sequence_table
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

from torchrec_qr import QuotientRemainder
from torchrec_qr.distributed import CompositionalEmbeddingCollectionSharder

SIZES = (3, 1)


def train_on(rank: int, world_size: int, sharding: str, quantised: bool = False) -> tuple[str, bool]:
    """Returns what training raises, or nothing, and whether all outputs were right."""
    configs = two_tables()
    values = unsharded(configs)
    codecs = None
    if quantised:
        config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
        codecs = get_qcomm_codecs_registry(config, device=torch.device("cpu"))
    model = shard(configs, sharding, values=values, codecs=codecs)
    n, tolerance = SIZES[rank], 1e-3 if quantised else 1e-5
    ids = torch.arange(2 * n) + 10 * rank
    batch = KeyedJaggedTensor(["f_a", "f_b"], ids, lengths=torch.ones(2 * n, dtype=torch.int64))
    expected = values(batch)
    with torch.no_grad():
        right = torch.allclose(model(batch), expected, rtol=tolerance)
    try:
        out = model(batch)
        right &= torch.allclose(out, expected, rtol=tolerance) and out.shape == (n, 2 * DIM)
        out.sum().backward()
    except ValueError as error:
        return str(error), right
    return "", right


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "row_wise", "data_parallel"])
def test_ranks_train_on_them(sharding: str) -> None:
    assert run_ranks(train_on, 2, sharding) == [("", True)] * 2


@pytest.mark.parametrize(("sharding", "quantised"), [("table_row_wise", False), ("row_wise", True)])
def test_what_gloo_cannot_gather_names_the_sizes_on_every_rank(sharding: str, quantised: bool) -> None:
    for message, right in run_ranks(train_on, 2, sharding, quantised):
        assert right
        assert message.startswith("tables 'a', 'b': batches of [3, 1] bags of a feature on the ranks, in order")


def train_without_bags(rank: int, world_size: int, dedup: bool) -> None:
    """Sequences: in turn, the batch of a rank has no bags."""
    kinds = {"dp": data_parallel(), "tw": table_wise(rank=1), "rw": row_wise(), "cw": column_wise(ranks=[0, 1])}
    configs = [sequence_table(QuotientRemainder(num_collisions=4), name=name) for name in kinds]
    values = collection_of(configs)
    sharder = CompositionalEmbeddingCollectionSharder({"learning_rate": 0.1}, use_index_dedup=dedup)
    plan = construct_module_sharding_plan(values, kinds, sharder, world_size, world_size, "cpu")
    model: Any = DistributedModelParallel(
        nn.ModuleDict({"c": copy.deepcopy(values)}),
        device=torch.device("cpu"),
        plan=ShardingPlan({"c": plan}),
        sharders=[sharder],
    ).module["c"]
    for step in range(4):
        bags = 0 if rank == step % 2 else 3
        keys = [f"f_{name}" for name in kinds]
        batch = KeyedJaggedTensor(keys, torch.arange(bags * 4), lengths=torch.ones(bags * 4, dtype=torch.int64))
        out, expected = model(batch).wait(), values(batch)
        for key in keys:
            assert torch.equal(out[key].lengths(), expected[key].lengths())
            assert out[key].values().shape == (bags, 8)
            if step < 2:  # a loss of 0 steps nothing in the first step
                torch.testing.assert_close(out[key].values(), expected[key].values())
        torch.cat([of.values() for of in out.values()]).sum().mul(0.0 if step == 0 else 1.0).backward()


@pytest.mark.parametrize("dedup", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_without_bags_takes_part(dedup: bool) -> None:
    run_ranks(train_without_bags, 2, dedup)
