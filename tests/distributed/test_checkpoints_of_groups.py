"""Checkpoints of groups of ranks, and of ``DTensor`` state dicts: their keys and values are those of any other."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from global_batches import global_batch
from groups_of_ranks import GROUP_SIZE, in_groups, place_of
from placements import SHARDING_GROUP, placements, plan_of
from ranks import run_ranks
from sharded_model import (
    ADAGRAD,
    EPS,
    LR,
    Scaled,
    contents,
    shard,
    sharders_of,
    state_of,
    steps_of,
    tables,
    unsharded,
    weights_of,
)
from single_tables import collection_of
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_qr.distributed.async_checkpoint import async_save
from torchrec_qr.distributed.checkpoint import load

PLAIN_STATE = "collection.embedding_bags.plain.weight plain.momentum1"


def model_in_groups(sharding: str, optimizer: Any, seed: int) -> Any:
    os.environ[SHARDING_GROUP] = str(GROUP_SIZE)
    sharders = sharders_of({"optimizer": optimizer, "learning_rate": LR, "eps": EPS})
    collection = collection_of(tables(), "meta")
    plan = plan_of(collection, placements(tables(), sharding), sharders[0])
    for of_table in plan.values():
        # Plain tables of the dense kernel, which TorchRec's helpers choose, are refused.
        of_table.compute_kernel = "dense" if of_table.sharding_type == "data_parallel" else "fused"
    return in_groups(Scaled(collection), plan, sharders, unsharded(tables(), seed))


def train_apart(model: Any, steps: range) -> None:
    """Trains each group on other batches, and averages the groups at the end."""
    group, rank = place_of(model)
    batches = (global_batch(tables(), step + 10 * group).part(rank, GROUP_SIZE).kjt() for step in steps)
    list(steps_of(model, batches))
    model.sync()


def values_of(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """Weights and optimizer states, whole. A `DTensor` of TorchRec's gives no 16-bit type."""
    return {k: v.double() for k, v in (weights_of(model) | state_of(model)).items() if not k.endswith("fingerprint")}


def save_in_groups(rank: int, world_size: int, sharding: str, optimizer: Any, folder: Path) -> None:
    model = model_in_groups(sharding, optimizer, seed=1)
    train_apart(model, range(2))
    dcp.save(contents(model), checkpoint_id=folder / "checkpoint")
    expected = values_of(model)
    train_apart(model, range(2, 3))
    assert_differ(values_of(model), expected)
    waiting = dist.new_group(backend="gloo")
    train_apart(model, range(3, 4))
    saved = async_save(contents(model), checkpoint_id=folder / "async", process_group=waiting)
    of_async = values_of(model)
    train_apart(model, range(4, 5))
    saved.result()
    if rank == 0:
        torch.save((expected, of_async), folder / "expected.pt")


def assert_differ(values: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert values.keys() == others.keys()
    assert any(not torch.equal(value, others[key]) for key, value in values.items())


def load_alone(rank: int, world_size: int, shardings: tuple[str, ...], optimizer: Any, folder: Path) -> None:
    for name, expected in zip(("checkpoint", "async"), torch.load(folder / "expected.pt"), strict=True):
        for sharding in shardings:
            model = shard(tables(), sharding, optimizer, values=unsharded(tables(), seed=2))
            load(contents(model), checkpoint_id=folder / name)
            own = values_of(model)
            # The plain table has the dense kernel here, without a state.
            assert expected.keys() - own.keys() <= {PLAIN_STATE}
            assert_all_close(own, {key: expected[key] for key in own}, f"{name} → {sharding}")


def load_in_groups(rank: int, world_size: int, shardings: tuple[str, ...], optimizer: Any, folder: Path) -> None:
    expected, _ = torch.load(folder / "expected.pt")
    for sharding in shardings:
        model = model_in_groups(sharding, optimizer, seed=2)
        load(contents(model), checkpoint_id=folder / "checkpoint")
        assert_all_close(values_of(model), expected, f"groups → {sharding} in groups")


def load_unsharded(folder: Path) -> None:
    expected, _ = torch.load(folder / "expected.pt")
    model = unsharded(tables(), seed=2)
    load({"model": model}, checkpoint_id=folder / "checkpoint", no_dist=True)
    own = {k: v.double() for k, v in model.state_dict().items() if not k.endswith("fingerprint")}
    assert_all_close(own, {k: v for k, v in expected.items() if k in own}, "groups → unsharded")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["column_wise", "row_wise", "grid_shard"])
def test_a_checkpoint_of_groups_loads_anywhere(sharding: str, tmp_path: Path) -> None:
    run_ranks(save_in_groups, 4, sharding, ADAGRAD, tmp_path, local_world_size=1)
    metadata = dcp.FileSystemReader(tmp_path / "checkpoint").read_metadata()
    keys = {f"model.{key}" for key in unsharded(tables()).state_dict()}
    assert {key for key in metadata.state_dict_metadata if key.startswith("model.")} == keys
    run_ranks(load_alone, 1, ("table_wise",), ADAGRAD, tmp_path)
    run_ranks(load_alone, 2, ("column_wise", "row_wise"), ADAGRAD, tmp_path)
    run_ranks(load_in_groups, 4, ("grid_shard", "row_wise"), ADAGRAD, tmp_path, local_world_size=2)
    load_unsharded(tmp_path)
