"""``output_dtensor=True`` of a sharding environment: state dicts of ``DTensor``, and the same training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import ADAGRAD, ROWWISE, contents, shard, state_of, tables, train, unsharded, weights_of
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from torchrec_qr.distributed.checkpoint import load


def env_of(dtensors: bool) -> ShardingEnv:
    return ShardingEnv(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, output_dtensor=dtensors)


def model_of(sharding: str, dtensors: bool, optimizer: Any = ADAGRAD, seed: int = 1) -> DistributedModelParallel:
    return shard(tables(), sharding, optimizer, unsharded(tables(), seed), env=env_of(dtensors))


def values_of(model: DistributedModelParallel) -> dict[str, Tensor]:
    """Weights and states, whole, in fp64: a ``DTensor`` of TorchRec's does not have the type of its shards."""
    return {k: v.double() for k, v in (weights_of(model) | state_of(model)).items() if "fingerprint" not in k}


def with_and_without(rank: int, world_size: int, sharding: str, folder: Path) -> None:
    model, plain = model_of(sharding, True), model_of(sharding, False)
    outs = [train(m, tables(), range(2)) for m in (model, plain)]
    for out, expected in zip(*outs, strict=True):
        assert torch.equal(out, expected)
    expected_values = values_of(plain)
    assert_all_close(values_of(model), expected_values, sharding)
    states = (model.state_dict(), plain.state_dict())
    kinds = [
        {key for key, value in state.items() if isinstance(value, kind)}
        for state, kind in zip(states, KINDS, strict=True)
    ]
    assert kinds[0] == kinds[1]
    assert bool(kinds[0]) == (sharding != "data_parallel")
    # A state dict loads into its own kind, and checkpoints into any.
    other = model_of(sharding, True, seed=2)
    other.load_state_dict(states[0])
    other.fused_optimizer.load_state_dict(model.fused_optimizer.state_dict())
    assert_all_close(values_of(other), expected_values, f"{sharding}: state dict")
    set_model_state_dict((into := model_of(sharding, True, seed=2)).module, get_model_state_dict(model.module))
    assert_all_close(weights_of(into), weights_of(model), f"{sharding}: model state dict")
    for name, saved, dtensors in (("with", model, False), ("without", plain, True)):
        dcp.save(contents(saved), checkpoint_id=folder / name)
        load(contents(into := model_of(sharding, dtensors, seed=2)), checkpoint_id=folder / name)
        assert_all_close(values_of(into), expected_values, f"{sharding}: saved {name}")


KINDS: tuple[Any, Any] = (DTensor, ShardedTensor)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", BASIC_SHARDINGS)
def test_training_and_checkpoints_are_those_of_sharded_tensors(sharding: str, tmp_path: Path) -> None:
    run_ranks(with_and_without, 2, sharding, tmp_path)


def convert(rank: int, world_size: int, folder: Path) -> None:
    """Rowwise state of whole columns becomes that of column shards, as without ``output_dtensor``."""
    whole = model_of("table_wise", True, ROWWISE)
    train(whole, tables(), range(2))
    dcp.save(contents(whole), checkpoint_id=folder)
    of_kinds = []
    for dtensors in (True, False):
        load(contents(into := model_of("column_wise", dtensors, ROWWISE, seed=2)), checkpoint_id=folder)
        of_kinds.append(values_of(into))
    assert_all_close(*of_kinds, "column_wise")
    first = "collection.embedding_bags.strided_mult.partition_0.weight strided_mult.partition_0.momentum1"
    assert torch.equal(of_kinds[0][first].view(3, -1), values_of(whole)[first].expand(3, -1))


@pytest.mark.slow
def test_rowwise_state_converts_between_column_splits(tmp_path: Path) -> None:
    run_ranks(convert, 2, tmp_path)
