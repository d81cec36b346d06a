"""``planner.plan_file``: a job takes the plan of a file on all ranks, keeps a copy, and refuses another's."""

import json
from pathlib import Path

import pytest

from launch.config import read_job
from tests.launch.jobs import DEMO, SMALL, refused, run, with_set
from tests.run_metrics import metrics
from torchrec_qr.cli.commands import main

# The planner would choose other sharding types for these.
PLACES = (
    "{cat_0: {sharding_types: [row_wise]}, cat_1: {sharding_types: [table_wise], ranks: [1]}, "
    "cat_2: {same_rank_as: cat_1}}"
)


def config_of(folder: Path, planner: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(f"base: {DEMO}\nplanner: {planner}\n")
    return path


def made(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    config = config_of(folder, f"{{constraints: {PLACES}}}")
    file = folder / "plan.json"
    cluster = ("--topology", "1x2", "--device", "cpu", "--batch-size", "256")
    assert main(["plan", "--config", str(config), *cluster, "--json", str(file)]) == 0
    capsys.readouterr()
    return file


@pytest.mark.slow
def test_a_job_takes_the_plan_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, capsys)
    run(tmp_path / "planned", *with_set(*SMALL), config=config_of(tmp_path, f"{{constraints: {PLACES}}}"))
    run(tmp_path / "taken", *with_set(*SMALL), config=config_of(tmp_path, "{plan_file: plan.json}"))
    planned, taken = tmp_path / "planned" / "demo", tmp_path / "taken" / "demo"
    assert (taken / "plan.txt").read_text() == (planned / "plan.txt").read_text()
    assert "row_wise" in (taken / "plan.txt").read_text()
    losses = [[line["loss"] for line in metrics(run) if line["split"] == "train"] for run in (planned, taken)]
    assert losses[0] == losses[1]
    # The run needs no other file.
    kept = read_job(taken / "config.yaml").planner.plan_file
    assert kept is not None
    assert kept.startswith("plans/")
    (tmp_path / "plan.json").unlink()
    run(tmp_path / "again", *with_set("train.max_steps=1"), config=taken / "config.yaml")
    assert (tmp_path / "again" / "demo" / "plan.txt").read_text() == (planned / "plan.txt").read_text()


@pytest.mark.slow
def test_all_ranks_end_if_the_plan_of_a_file_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = made(tmp_path, capsys)
    config = config_of(tmp_path, "{plan_file: plan.json}")
    for printed in refused(tmp_path / "runs", *with_set(*SMALL, "tables[cat_3].num_embeddings=30000"), config=config):
        assert f"planner.plan_file: {file} does not fit this job:" in printed
        assert "table 'cat_3': num_embeddings: saved 25000, here 30000; physical_rows: saved 6254, here 7504" in printed
        assert "allowed: a plan that `torchrec-qr plan --json` makes of this config on these ranks" in printed
    (printed,) = refused(tmp_path / "one", *with_set(*SMALL), config=config, world_size=1)
    assert "world_size: saved 2, here 1" in printed
    assert "local_world_size: saved 2, here 1" in printed
    (printed,) = refused(tmp_path / "none", *with_set("planner.plan_file=none.json"), config=config, world_size=1)
    assert "planner.plan_file: 'none.json' cannot be read: No such file or directory; allowed: a file that" in printed
    file.write_text(json.dumps({"devices": {"cpu": {"feasible": True}}}))
    (printed,) = refused(tmp_path / "wrong", *with_set(*SMALL), config=config, world_size=1)
    assert "plan.json: 7 errors" in printed
    assert "devices.cpu.tables: missing" in printed
