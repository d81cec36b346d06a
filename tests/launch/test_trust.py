"""The folder of a run is data: a checkpoint that would run code is refused, before any of it has run."""

import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorProperties

from launch.dcp_reader import CheckpointReader, UnsafeCheckpointError
from launch.run_checkpoints import CheckpointError, errors_of_dcp
from launch.weights import write_weights
from tests.launch.jobs import refused, run, start, with_set
from tests.launch.parquet_job import config, rows, write
from tests.run_metrics import forget_the_end


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, file: Path) -> None:
        self._command = f"touch {file}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def metadata(state: Path) -> Any:
    return CheckpointReader(state).read_metadata()


def rewrite(state: Path, changed: Any) -> None:
    (state / ".metadata").write_bytes(pickle.dumps(changed))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    dcp.save(
        {"w": torch.arange(4.0), "n": {"lr": 0.5, "kind": "x"}}, checkpoint_id=str(tmp_path / "state"), no_dist=True
    )
    return tmp_path / "state"


def loaded(state: Path) -> dict[str, Any]:
    into = {"w": torch.zeros(4), "n": {"lr": 0.0, "kind": ""}}
    reader = CheckpointReader(state)
    with errors_of_dcp(f"cannot load {state}", reader):
        dcp.load(into, storage_reader=reader, no_dist=True)
    return into


def test_what_dcp_writes_is_read(state: Path) -> None:
    into = loaded(state)
    assert into["w"].tolist() == [0, 1, 2, 3]
    assert into["n"] == {"lr": 0.5, "kind": "x"}


def test_every_kind_of_tensor_that_dcp_describes_is_read(tmp_path: Path) -> None:
    """Names that metadata needs of each dtype and memory format are allowed."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in dtypes}
    dcp.save(tensors, checkpoint_id=str(tmp_path / "state"), no_dist=True)
    changed = metadata(tmp_path / "state")
    for memory_format in (torch.contiguous_format, torch.preserve_format, torch.channels_last):
        properties = TensorProperties(memory_format=memory_format)
        changed.state_dict_metadata["torch.bool"].properties = properties
        rewrite(tmp_path / "state", changed)
        read = metadata(tmp_path / "state").state_dict_metadata
        assert read["torch.bool"].properties.memory_format is memory_format
    assert [read[str(dtype)].properties.dtype for dtype in dtypes[:-1]] == dtypes[:-1]


def test_metadata_that_would_run_code_is_refused(state: Path) -> None:
    ran = state / "ran"
    rewrite(state, Runs(ran))
    with pytest.raises(CheckpointError) as caught:
        loaded(state)
    text = str(caught.value)
    assert f"{state / '.metadata'}: would run code, as it names posix.system" in text
    assert not ran.exists()
    dcp_itself: dict[str, Any] = {"w": torch.zeros(4)}
    with pytest.raises(dcp.CheckpointException):
        dcp.load(dcp_itself, checkpoint_id=str(state), no_dist=True)
    assert ran.exists()  # what is refused here is no dud


def test_code_within_metadata_is_refused(state: Path) -> None:
    ran = state / "ran"
    changed = metadata(state)
    changed.planner_data = Runs(ran)
    rewrite(state, changed)
    with pytest.raises(UnsafeCheckpointError, match=r"\.metadata: would run code, as it names posix\.system"):
        metadata(state)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.hub.load", "os.system"])
def test_names_beyond_dcps_own_are_refused(state: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    (state / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(UnsafeCheckpointError, match=rf"as it names {name}; allowed"):
        metadata(state)


def test_members_that_python_3_11_2_pickles_by_getattr_are_read(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12 has that Python."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    changed = metadata(state)
    changed.state_dict_metadata["w"].properties = TensorProperties(memory_format=torch.channels_last)
    rewrite(state, changed)
    assert b"getattr" in (state / ".metadata").read_bytes()
    assert metadata(state).state_dict_metadata["w"].properties.memory_format is torch.channels_last


@pytest.mark.parametrize(
    "arguments",
    [
        (Metadata, "__init__"),
        (torch.Size, "__class__"),
        (_MEM_FORMAT_ENCODING, "__members__"),
        (_MEM_FORMAT_ENCODING, ["TORCH_CHANNELS_LAST"]),
        (_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST", None),
    ],
)
def test_getattr_of_anything_else_is_refused(state: Path, arguments: tuple[object, ...]) -> None:
    class Attribute:
        def __reduce__(self) -> Any:
            return getattr, arguments

    rewrite(state, Attribute())
    with pytest.raises(UnsafeCheckpointError, match=r"as it names builtins\.getattr; allowed"):
        metadata(state)


def test_getattr_alone_is_no_metadata(state: Path) -> None:
    (state / ".metadata").write_bytes(b"cbuiltins\ngetattr\n.")
    with pytest.raises(UnsafeCheckpointError, match="holds a method; allowed: metadata of a checkpoint"):
        metadata(state)


def test_an_item_that_would_run_code_is_refused(state: Path) -> None:
    ran = state / "ran"
    changed = metadata(state)
    index = next(index for index in changed.storage_data if index.fqn == "n.lr")
    item = io.BytesIO()
    torch.save(Runs(ran), item)
    (state / "item.distcp").write_bytes(item.getvalue())
    changed.storage_data[index].relative_path, changed.storage_data[index].offset = "item.distcp", 0
    changed.storage_data[index].length = len(item.getvalue())
    rewrite(state, changed)
    with pytest.raises(CheckpointError, match=r"item n\.lr would run code, as it names posix\.system") as caught:
        loaded(state)
    assert str(state / "item.distcp") in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "..", ""])
def test_a_file_of_another_folder_is_refused(state: Path, name: str) -> None:
    changed = metadata(state)
    for info in changed.storage_data.values():
        info.relative_path = name
    rewrite(state, changed)
    with pytest.raises(UnsafeCheckpointError, match="allowed: files of the same folder"):
        metadata(state)


def test_no_part_of_the_job_runs_code_of_a_folder(tmp_path: Path) -> None:
    """Going on with a run, starting from one, and writing a run's weights."""
    write(tmp_path / "rows.parquet", rows(1000, seed=1))
    job = config(tmp_path, files=["rows.parquet"])
    run(tmp_path, *with_set("train.max_steps=5"), config=job, world_size=1)
    shutil.copytree(tmp_path / "t", tmp_path / "own")
    forget_the_end(tmp_path / "own")
    ran = tmp_path / "ran"
    for state in (tmp_path / "t" / "best" / "step_5" / "state", tmp_path / "own" / "checkpoints" / "step_5" / "state"):
        rewrite(state, Runs(ran))
    for arguments in (("--name=own",), ("--name=u", f"--set=train.init_from={tmp_path / 't'}")):
        ranks = start(tmp_path, *arguments, config=job)
        assert ranks.exit_codes() == [1, 1]
        for output in ranks.outputs:  # in which PyTorch prints a traceback of its own
            assert "state/.metadata: would run code, as it names posix.system" in output.read_text()
    with pytest.raises(UnsafeCheckpointError):
        write_weights(tmp_path / "t" / "best" / "step_5" / "state", tmp_path / "weights", {})
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/x", ".", "..", ""])
def test_a_name_that_leads_out_of_the_runs_is_refused(tmp_path: Path, name: str) -> None:
    config_file = config(tmp_path, files=["rows.parquet"])
    ranks = start(tmp_path, f"--name={name}", config=config_file, world_size=1)
    assert ranks.exit_codes() == [2]
    assert f"argument --name: {name!r}; allowed: the name of a folder in --runs" in ranks.text()


@pytest.mark.parametrize("linked", ["t", "t/checkpoints", "t/best", "t/weights"])
def test_a_link_where_the_run_removes_and_renames_is_refused(tmp_path: Path, linked: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step_1").mkdir(parents=True)
    (elsewhere / "part_1").mkdir()
    write(tmp_path / "rows.parquet", rows(500, seed=1))
    link = tmp_path / "runs" / linked
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    (text,) = refused(tmp_path / "runs", config=config(tmp_path, files=["rows.parquet"]), world_size=1)
    assert f"{link} is a symbolic link to {elsewhere}" in text
    assert sorted(path.name for path in elsewhere.iterdir()) == ["part_1", "step_1"]
