"""The tables of a job that are TorchRec's own, half-precision tables under every placement, and frozen ones."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchrec import EmbeddingBagConfig

from launch.config import read_job
from launch.job_tables import job_tables
from tests.launch.jobs import DEMO, SMALL, run, with_set
from tests.run_metrics import metrics
from torchrec_qr import CompositionalEmbeddingBagConfig
from torchrec_qr.cli.schema.config_error import ConfigError


def plain_tables(*overrides: str) -> list[EmbeddingBagConfig]:
    tables = job_tables(read_job(DEMO, overrides), DEMO.parent)
    return [t for t in tables if not isinstance(t, CompositionalEmbeddingBagConfig)]


def test_only_tables_that_torchrec_trains_alike_everywhere_are_its_own() -> None:
    assert len(plain_tables()) == 12
    for overrides in (
        ("tables[*].data_type=fp16",),
        ("tables[*].data_type=bf16",),
        ("optimizer.sparse.name=adam",),
        ("optimizer.sparse.name=amsgrad",),
        ("optimizer.sparse.name=lamb",),
        ("optimizer.sparse.weight_decay=0.1", "optimizer.sparse.weight_decay_mode=l2"),
    ):
        assert plain_tables(*overrides) == []
    assert len(plain_tables("tables[20].data_type=fp16")) == 11


def losses(runs: Path, sharding: str, data_type: str) -> list[float]:
    names = [t.name for t in read_job(DEMO).tables]
    constraints = "{" + ", ".join(f"{name}: {{sharding_types: [{sharding}]}}" for name in names) + "}"
    settings = (*SMALL, f"tables[*].data_type={data_type}", f"planner.constraints={constraints}", "train.max_steps=6")
    run(runs, *with_set(*settings))
    return [line["loss"] for line in metrics(runs / "demo") if line["split"] == "train"]


@pytest.mark.parametrize("sharding", [pytest.param("data_parallel", marks=pytest.mark.slow), "table_wise"])
def test_half_precision_tables_train_wherever_they_lie(tmp_path: Path, sharding: str) -> None:
    """Adagrad's eps of 1e-8 is 0 in fp16: stepped in fp16, a row without a gradient would become NaN."""
    # Values start otherwise than those of TorchRec's own tables, so that losses are near one another and not equal.
    expected = losses(tmp_path / "fp32", sharding, "fp32")
    assert len(expected) == 3
    for data_type in ("fp16", "bf16"):
        assert losses(tmp_path / data_type, sharding, data_type) == pytest.approx(expected, rel=0.25)


def test_frozen_tables_keep_the_values_they_start_with(tmp_path: Path) -> None:
    """A compressed table and a plain one, in the checkpoints of the first and of the last step."""
    assert len(plain_tables("train.frozen=[cat_0, cat_20]")) == 11
    settings = (*SMALL, "train.frozen=[cat_0, cat_20]", "train.max_steps=4", "train.checkpoint_every=2")
    run(tmp_path, *with_set(*settings), world_size=1)
    first, last = (saved(tmp_path / "demo" / "checkpoints" / f"step_{step}" / "state") for step in (2, 4))
    kept = {name for name in first if torch.equal(first[name], last[name])}
    moved = {name.split(".")[-3] for name in set(first) - kept if ".partition_" in name}
    assert {name.split(".")[-3] for name in kept if ".partition_" in name} >= {"cat_0", "cat_20"}
    assert "cat_1" in moved
    assert not moved & {"cat_0", "cat_20"}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The tables' values of a checkpoint, whole."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    values = {
        name: torch.empty(m.size) for name, m in metadata.items() if name.endswith(".weight") and ".partition_" in name
    }
    dcp.load(values, storage_reader=FileSystemReader(folder), no_dist=True)
    return values


def test_an_unknown_table_is_not_frozen_in_silence() -> None:
    with pytest.raises(ConfigError, match=r"train.frozen\[0\].*cat_99.*allowed: names of tables: cat_0, cat_1"):
        read_job(DEMO, ["train.frozen=[cat_99]"])
