"""A checkpoint of one plan and world size continues training under any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from global_batches import batch_of
from placements import BASIC_SHARDINGS
from ranks import run_ranks
from sharded_model import ADAGRAD, ROWWISE, SGD, contents, shard, state_of, table, tables, train, unsharded, weights_of
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, table_wise

from torchrec_qr import (
    QuotientRemainder,
)
from torchrec_qr.distributed.checkpoint import load

BEFORE, AFTER = range(3), range(3, 6)


def other(sharding: Any, optimizer: EmbOptimType) -> DistributedModelParallel:
    """A model with other values, and with other optimizer state, than the one that was saved."""
    model = shard(tables(), sharding, optimizer, values=unsharded(tables(), seed=2))
    train(model, tables(), range(90, 91))
    return model


def save_midway(rank: int, world_size: int, sharding: str, optimizer: EmbOptimType, folder: Path) -> None:
    model = shard(tables(), sharding, optimizer, values=unsharded(tables()))
    train(model, tables(), BEFORE)
    dcp.save(contents(model), checkpoint_id=folder / "checkpoint")
    expected = {"saved": (weights_of(model), state_of(model))}
    train(model, tables(), AFTER)
    expected["final"] = weights_of(model), state_of(model)
    if rank == 0:
        torch.save(expected, folder / "expected.pt")


def load_and_finish(
    rank: int, world_size: int, shardings: tuple[str, ...], optimizer: EmbOptimType, folder: Path, exact: str | None
) -> None:
    expected = torch.load(folder / "expected.pt", map_location="cpu")
    for sharding in shardings:
        model = other(sharding, optimizer)
        # Stock DCP: its state needs no conversion here.
        dcp.load(contents(model), checkpoint_id=folder / "checkpoint")
        assert_all_close(weights_of(model), expected["saved"][0], f"{sharding}: weights loaded")
        assert_all_close(state_of(model), expected["saved"][1], f"{sharding}: state loaded")
        train(model, tables(), AFTER)
        tolerances = {} if sharding == exact else {"rtol": 1e-4, "atol": 1e-5, "of_half": 5e-3}
        assert_all_close(weights_of(model), expected["final"][0], f"{sharding}: weights at the end", **tolerances)
        assert_all_close(state_of(model), expected["final"][1], f"{sharding}: state at the end", **tolerances)


@pytest.mark.parametrize("optimizer", [pytest.param(ADAGRAD, marks=pytest.mark.slow), EmbOptimType.ADAM], ids=str)
def test_a_checkpoint_of_two_ranks_continues_under_every_plan_and_world_size(
    optimizer: EmbOptimType, tmp_path: Path
) -> None:
    """The number of steps of Adam goes along."""
    run_ranks(save_midway, 2, "table_wise", optimizer, tmp_path)
    run_ranks(load_and_finish, 2, BASIC_SHARDINGS, optimizer, tmp_path, "table_wise")
    run_ranks(load_and_finish, 1, ("table_wise", "data_parallel"), optimizer, tmp_path, None)
    four = ("table_row_wise", "grid_shard", "row_wise")
    run_ranks(load_and_finish, 4, four, optimizer, tmp_path, None, local_world_size=2)


def test_a_checkpoint_of_a_grid_of_four_ranks_continues_on_two(tmp_path: Path) -> None:
    run_ranks(save_midway, 4, "grid_shard", ADAGRAD, tmp_path, local_world_size=2)
    run_ranks(load_and_finish, 4, ("grid_shard",), ADAGRAD, tmp_path, "grid_shard", local_world_size=2)
    run_ranks(load_and_finish, 2, ("column_wise", "row_wise"), ADAGRAD, tmp_path, None)


def move_to_unsharded_and_back(rank: int, world_size: int, folder: Path) -> None:
    alone = unsharded(tables())
    if rank == 0:
        dcp.save({"model": alone}, checkpoint_id=folder / "unsharded", no_dist=True)
    torch.distributed.barrier()
    for sharding in BASIC_SHARDINGS:
        model = other(sharding, ADAGRAD)
        dcp.load({"model": model}, checkpoint_id=folder / "unsharded")
        assert_all_close(weights_of(model), alone.state_dict(), f"unsharded → {sharding}")
        train(model, tables(), BEFORE)
        dcp.save({"model": model}, checkpoint_id=folder / sharding)
        trained, back = weights_of(model), unsharded(tables(), seed=2)
        load({"model": back}, checkpoint_id=folder / sharding, no_dist=True)
        assert_all_close(back.state_dict(), trained, f"{sharding} → unsharded")
        batch = batch_of(tables(), 9, rank, world_size)
        torch.testing.assert_close(back(batch), model(batch), rtol=1e-4, atol=1e-4)


def test_checkpoints_move_between_sharded_and_unsharded_modules(tmp_path: Path) -> None:
    run_ranks(move_to_unsharded_and_back, 2, tmp_path)


def save_one_step(
    rank: int, world_size: int, shardings: tuple[str, ...], folder: Path, optimizer: EmbOptimType = ROWWISE
) -> None:
    """Of one step from the same values, the state is the same under every plan, up to its split by columns."""
    for sharding in shardings:
        model = shard(tables(), sharding, optimizer, values=unsharded(tables()))
        train(model, tables(), range(1))
        dcp.save(contents(model), checkpoint_id=folder / sharding)
        state = state_of(model)
        if rank == 0:
            torch.save(state, folder / f"{sharding}.pt")


def column_shares(model: DistributedModelParallel, state_name: str) -> Tensor:
    """The share of each column shard, in order, in the columns of the partition that a state belongs to."""
    weight = model.state_dict()[state_name.split()[0]]
    if not hasattr(weight, "metadata"):
        return torch.ones(1, dtype=torch.float64)
    columns = sorted({(s.shard_offsets[1], s.shard_sizes[1]) for s in weight.metadata().shards_metadata})
    return torch.tensor([size / weight.size(1) for _, size in columns], dtype=torch.float64)


def load_rowwise(
    rank: int,
    world_size: int,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    folder: Path,
    optimizer: EmbOptimType = ROWWISE,
) -> None:
    per_row = torch.load(folder / "table_wise.pt")
    for source in sources:
        for target in targets:
            model = other(target, optimizer)
            load(contents(model), checkpoint_id=folder / source)
            state = state_of(model)
            if source == target:
                assert_all_close(state, torch.load(folder / f"{source}.pt"), f"{source} → itself")
                continue
            assert set(state) == set(per_row)
            for name, rows in per_row.items():
                if rows.dim() != 1:
                    assert_all_close(
                        {name: state[name]}, {name: rows}, f"{source} → {target}", 1e-4, 1e-7, of_half=1e-2
                    )
                    continue
                blocks = state[name].view(-1, rows.numel())
                # Merged, h is the mean over all columns. A split copies it, so that it is each block's and their mean.
                torch.testing.assert_close(
                    column_shares(model, name) @ blocks,
                    rows,
                    rtol=1e-2 if "half" in name else 1e-4,
                    atol=1e-7,
                    msg=lambda m, what=f"{source} → {target}: {name}": f"{what}: {m}",
                )
                if source == "table_wise":
                    assert torch.equal(blocks, rows.expand_as(blocks)), f"{source} → {target}: {name}"


def test_rowwise_state_converts_between_column_splits(tmp_path: Path) -> None:
    run_ranks(save_one_step, 2, BASIC_SHARDINGS, tmp_path)
    run_ranks(load_rowwise, 2, ("table_wise", "column_wise"), BASIC_SHARDINGS, tmp_path)
    run_ranks(load_rowwise, 2, ("row_wise", "data_parallel"), ("column_wise", "table_wise"), tmp_path)
    run_ranks(save_one_step, 4, ("grid_shard",), tmp_path, local_world_size=2)
    run_ranks(load_rowwise, 4, ("grid_shard", "column_wise"), ("grid_shard", "row_wise"), tmp_path, local_world_size=2)
    run_ranks(load_rowwise, 2, ("grid_shard",), ("table_wise", "data_parallel"), tmp_path)


@pytest.mark.slow
def test_the_second_moment_of_partial_rowwise_adam_converts_between_column_splits(tmp_path: Path) -> None:
    """The first moment and the number of steps stay as they are."""
    kind = EmbOptimType.PARTIAL_ROWWISE_ADAM
    run_ranks(save_one_step, 2, BASIC_SHARDINGS, tmp_path, kind)
    run_ranks(load_rowwise, 2, ("table_wise", "column_wise"), BASIC_SHARDINGS, tmp_path, kind)
    run_ranks(load_rowwise, 1, ("row_wise",), ("table_wise",), tmp_path, kind)


def split_unequally(rank: int, world_size: int, folder: Path) -> None:
    """h of columns [0, 8), [8, 24) into [0, 16), [16, 24): sizes agree, so that only the split tells them apart."""
    configs = [table("t", QuotientRemainder(num_collisions=7), "mult")]
    values = unsharded(configs)
    model = shard(configs, {"t": column_wise(size_per_rank=[8, 16])}, ROWWISE, values)
    train(model, configs, range(1))
    dcp.save(contents(model), checkpoint_id=folder)
    saved = {name: h.view(2, -1) for name, h in state_of(model).items()}
    model = shard(configs, {"t": column_wise(size_per_rank=[16, 8])}, ROWWISE, values)
    load(contents(model), checkpoint_id=folder)
    for name, h in state_of(model).items():
        torch.testing.assert_close(h.view(2, -1)[0], (saved[name][0] + saved[name][1]) / 2, msg=name)
        assert torch.equal(h.view(2, -1)[1], saved[name][1]), name
    with pytest.raises(
        dcp.api.CheckpointException, match=r"Size mismatch.*optimizer\.state.*t\.partition_0\.momentum1"
    ):
        dcp.load(contents(shard(configs, "table_wise", ROWWISE)), checkpoint_id=folder)


def test_unequal_column_shards_convert_and_stock_dcp_refuses_another_size_by_name(tmp_path: Path) -> None:
    run_ranks(split_unequally, 2, tmp_path)


def save_without_state(rank: int, world_size: int, folder: Path) -> None:
    model = shard(tables(), "table_wise", SGD, values=unsharded(tables()))
    train(model, tables(), range(1))
    assert state_of(model) == {}
    dcp.save(contents(model), checkpoint_id=folder)
    expected = weights_of(model)
    for sharding in BASIC_SHARDINGS:
        # Another optimizer has state that the checkpoint lacks: only the model is asked for.
        model = other(sharding, SGD)
        load(contents(model), checkpoint_id=folder)
        assert_all_close(weights_of(model), expected, sharding)
        with pytest.raises(dcp.api.CheckpointException, match=r"Missing key.*momentum1"):
            load(contents(other(sharding, ADAGRAD)), checkpoint_id=folder)


def test_sgd_which_has_no_state(tmp_path: Path) -> None:
    run_ranks(save_without_state, 2, tmp_path)


def several_unequal_shards_on_a_rank(rank: int, world_size: int, folder: Path) -> None:
    """Columns [0, 12) of partition 0 lie in two logical shards of 8: stored as 8 and 4 columns on one rank."""
    configs = [table("t", QuotientRemainder(num_collisions=7), "concat", partition_dims=[12, 12])]
    values = unsharded(configs)
    model = shard(configs, {"t": column_wise(ranks=[1, 1, 0])}, ADAGRAD, values)
    assert_all_close(weights_of(model), dict(sorted(values.state_dict().items())), "load_state_dict of whole values")
    train(model, configs, BEFORE)
    dcp.save(contents(model), checkpoint_id=folder)
    expected, state = weights_of(model), state_of(model)
    for sharding in ("table_wise", {"t": column_wise(ranks=[0, 0, 1])}, "row_wise"):
        model = shard(configs, sharding, ADAGRAD)
        load(contents(model), checkpoint_id=folder)
        assert_all_close(weights_of(model), expected, str(sharding))
        assert_all_close(state_of(model), state, str(sharding))
        # The state dict of a model loads into it, and into itself sharded alike.
        model.load_state_dict(model.state_dict())
        assert_all_close(weights_of(model), expected, str(sharding))


def test_several_unequal_column_shards_of_a_table_on_one_rank(tmp_path: Path) -> None:
    run_ranks(several_unequal_shards_on_a_rank, 2, tmp_path)


def get_and_set(rank: int, world_size: int) -> None:
    for sharding in BASIC_SHARDINGS:
        model = shard(tables(), sharding, values=unsharded(tables()))
        train(model, tables(), range(1))
        state = get_model_state_dict(model.module)
        assert set(state) == set(unsharded(tables()).state_dict())
        into = other(sharding, ADAGRAD)
        incompatible = set_model_state_dict(into.module, state)
        assert (incompatible.missing_keys, incompatible.unexpected_keys) == ([], [])
        assert_all_close(weights_of(into), weights_of(model), sharding)


def test_get_and_set_model_state_dict() -> None:
    run_ranks(get_and_set, 2)


def load_under_another_default_device(rank: int, world_size: int, folder: Path) -> None:
    """The buffers of `load` are its own: the default device, often the meta one or a GPU, is not asked."""
    configs = tables()[:2]
    model = shard(configs, "column_wise", ROWWISE, values=unsharded(configs))
    train(model, configs, range(2))
    dcp.save(contents(model), checkpoint_id=folder)
    expected, state = weights_of(model), state_of(model)
    other = shard(configs, "table_wise", ROWWISE)
    with torch.device("meta"):
        load(contents(other), checkpoint_id=folder)
    assert_all_close(weights_of(other), expected, "weights")
    for name, rows in state_of(other).items():
        thirds = state[name].view(-1, rows.numel())
        torch.testing.assert_close(rows, thirds.mean(dim=0), rtol=1e-5, atol=1e-7, msg=name)


def test_loading_does_not_depend_on_the_default_device(tmp_path: Path) -> None:
    run_ranks(load_under_another_default_device, 2, tmp_path)


def load_values_beside_tensors(rank: int, world_size: int, folder: Path) -> None:
    configs = [table("t", QuotientRemainder(num_collisions=6), "mult")]
    model = shard(configs, {"t": table_wise(rank=1)}, values=unsharded(configs))
    dcp.save({**contents(model), "step": 7, "nested": {"epoch": 3}}, checkpoint_id=folder)
    state: dict[str, Any] = {"model": model.state_dict(), "step": 0, "nested": {"epoch": 0}}
    load(state, checkpoint_id=folder)
    assert (state["step"], state["nested"]) == (7, {"epoch": 3})


def test_load_also_returns_what_is_no_tensor(tmp_path: Path) -> None:
    run_ranks(load_values_beside_tensors, 2, tmp_path)
