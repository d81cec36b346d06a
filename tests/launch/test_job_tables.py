"""Which tables of a job are TorchRec's own, and that a half-precision table trains alike wherever it lies."""

from pathlib import Path

import pytest
from torchrec import EmbeddingBagConfig

from launch.config import read_job
from launch.tables import job_tables
from tests.launch.jobs import DEMO, SMALL, run, with_set
from tests.run_metrics import metrics
from torchrec_qr import CompositionalEmbeddingBagConfig


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
    ):
        assert plain_tables(*overrides) == []
    assert len(plain_tables("tables[20].data_type=fp16")) == 11


def losses(runs: Path, sharding: str, data_type: str) -> list[float]:
    names = [t.name for t in read_job(DEMO).tables]
    constraints = "{" + ", ".join(f"{name}: {{sharding_types: [{sharding}]}}" for name in names) + "}"
    settings = (*SMALL, f"tables[*].data_type={data_type}", f"planner.constraints={constraints}", "train.max_steps=6")
    run(runs, *with_set(*settings))
    return [line["loss"] for line in metrics(runs / "demo") if line["split"] == "train"]


@pytest.mark.parametrize("sharding", ["data_parallel", "table_wise"])
def test_half_precision_tables_train_wherever_they_lie(tmp_path: Path, sharding: str) -> None:
    """By Adagrad, whose eps of 1e-8 is 0 in fp16: stepped in fp16, a row without a gradient becomes NaN."""
    # Values start otherwise than those of TorchRec's own tables, so that losses are near one another and not equal.
    expected = losses(tmp_path / "fp32", sharding, "fp32")
    assert len(expected) == 3
    for data_type in ("fp16", "bf16"):
        assert losses(tmp_path / data_type, sharding, data_type) == pytest.approx(expected, rel=0.25)
