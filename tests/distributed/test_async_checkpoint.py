"""A checkpoint that is written while training goes on has the values of the call; also through fsspec."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from assert_all_close import assert_all_close
from ranks import run_ranks
from sharded_model import ADAGRAD, DIM, contents, shard, state_of, tables, train, unsharded, weights_of
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from torchrec_qr.distributed.async_checkpoint import async_save
from torchrec_qr.distributed.checkpoint import load

PLANS = ("table_wise", "row_wise", "data_parallel")


class HeldWriter(FileSystemWriter):
    """Begins to write once ``go_on`` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go_on = Event()

    def set_up_storage_writer(self, *args: Any, **kwargs: Any) -> None:
        assert self.go_on.wait(60)
        super().set_up_storage_writer(*args, **kwargs)


def assert_loads(folder: dict[str, Any], expected: tuple[dict[str, Any], dict[str, Any]], what: str) -> None:
    """Into a model of another plan, and with other values and state."""
    model = shard(tables(), "column_wise", ADAGRAD, values=unsharded(tables(), seed=2))
    train(model, tables(), range(90, 91))
    load(contents(model), **folder)
    assert_all_close(weights_of(model), expected[0], what)
    assert_all_close(state_of(model), expected[1], what)


def save_and_train_on(rank: int, world_size: int, folder: Path) -> None:
    group = dist.new_group(backend="gloo")
    for plan in PLANS:
        model = shard(tables(), plan, ADAGRAD, values=unsharded(tables()))
        train(model, tables(), range(2))
        expected = weights_of(model), state_of(model)
        writer = HeldWriter(folder / plan)
        saved = async_save(contents(model), storage_writer=writer, process_group=group)
        train(model, tables(), range(2, 4))
        after = weights_of(model)
        moved = {name for name, value in after.items() if not torch.equal(value, expected[0][name])}
        assert {name for name in after if "partition_0" in name} <= moved, plan
        writer.go_on.set()
        saved.result(60)
        dist.barrier()
        assert_loads({"checkpoint_id": folder / plan}, expected, plan)


def test_what_is_saved_are_the_values_of_the_call(tmp_path: Path) -> None:
    run_ranks(save_and_train_on, 2, tmp_path)


def save_by_url(rank: int, world_size: int, folder: Path) -> None:
    group = dist.new_group(backend="gloo")
    for plan in PLANS:
        model = shard(tables(), plan, ADAGRAD, values=unsharded(tables()))
        train(model, tables(), range(2))
        expected = weights_of(model), state_of(model)
        for how in ("now", "later"):
            url = {"checkpoint_id": f"file://{folder}/{plan}_{how}"}
            if how == "now":
                dcp.save(contents(model), **url)
            else:
                async_save(contents(model), process_group=group, **url).result(60)
            dist.barrier()
            assert_loads(url, expected, f"{plan}, {how}")
            # It is a folder as any other.
            assert FileSystemReader(folder / f"{plan}_{how}").read_metadata().state_dict_metadata


def test_fsspec_takes_what_sharded_collections_save(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    run_ranks(save_by_url, 2, tmp_path)


def refusals(rank: int, world_size: int, folder: Path) -> None:
    model = shard(tables(), "row_wise", ADAGRAD)
    for group, said in ((None, "process_group: None"), (dist.GroupMember.WORLD, "process_group: the default group")):
        with pytest.raises(ValueError, match=said) as caught:
            async_save(contents(model), checkpoint_id=folder, process_group=group)
        assert "allowed: a gloo group" in str(caught.value)
    assert not list(folder.iterdir())


def test_the_group_in_which_training_goes_on_is_refused(tmp_path: Path) -> None:
    run_ranks(refusals, 2, tmp_path)


def test_a_dtensor_is_refused_by_name() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        state = {"model": {"t": [torch.distributed.tensor.distribute_tensor(torch.ones(2, DIM), mesh)]}}
        with pytest.raises(TypeError, match=r"^model\.t\[0\]: a DTensor of Tensor; allowed: one of TorchRec"):
            async_save(state, checkpoint_id="unused", no_dist=True)
    finally:
        dist.destroy_process_group()


def test_an_error_of_the_writer_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saved = async_save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "file" / "step_1", no_dist=True)
    with pytest.raises(CheckpointException, match="NotADirectoryError"):
        saved.result(60)
