"""A job on two ranks, from its config to the last line of its metrics."""

import json
import re
from pathlib import Path

import pytest

from launch.config import read_job
from tests.launch.jobs import DEMO, SMALL, run, start, with_set
from tests.run_metrics import metrics


def test_a_run_leaves_its_folder(tmp_path: Path) -> None:
    overrides = (*SMALL, "train.eval_every=4", "train.checkpoint_every=4", "schedule.warmup_steps=5")
    printed = run(tmp_path, *with_set(*overrides), "--profile")
    folder = tmp_path / "demo"
    assert read_job(folder / "config.yaml") == read_job(DEMO, overrides)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_8", "step_11"}  # the last two
    assert len(list((folder / "best").iterdir())) == 1
    assert list((folder / "tensorboard").glob("events*"))
    for rank in range(2):
        assert json.loads((folder / f"trace_rank_{rank}.json").read_text())["traceEvents"]
    plan = (folder / "plan.txt").read_text()
    assert "100,000" in plan
    assert "25,004" in plan
    assert plan in printed

    lines = metrics(tmp_path / "demo")
    assert [(line["step"], line["split"]) for line in lines] == [
        (2, "train"),
        (4, "train"),
        (4, "validation"),
        (6, "train"),
        (8, "train"),
        (8, "validation"),
        (10, "train"),
        (11, "validation"),
        (lines[-1]["step"], "test"),
    ]
    rates = [line["lr"] for line in lines if line["split"] == "train"]
    assert rates == pytest.approx([0.02 * factor for factor in (0.4, 0.8, 1, 1, 1)])
    train = {"step", "split", "loss", "logloss", "ne", "auc", "calibration", "lr"}
    assert set(lines[0]) == train
    test = lines[-1]
    assert set(test) == {
        *("step", "split", "auc", "best_possible_auc", "dense_only_auc", "logloss", "ne", "calibration")
    }
    best = min((line for line in lines if line["split"] == "validation"), key=lambda line: line["logloss"])
    assert test["step"] == best["step"]
    assert test["best_possible_auc"] > test["dense_only_auc"] + 0.08
    for name in ("test AUC", "best possible AUC", "dense only AUC", "normalized entropy", "samples/s"):
        assert name in printed
    assert "##" in printed  # progress, though there is no terminal


def test_quiet_prints_validations_and_the_summary(tmp_path: Path) -> None:
    printed = run(tmp_path, *with_set(*SMALL, "train.max_steps=2"), "--quiet", world_size=1).strip().splitlines()
    # Warnings are of the libraries, and differ by version; a line of source follows each.
    lines = [line for line in printed if "Warning: " not in line and not line.startswith("  ")]
    assert lines[0].startswith("step 2: validation logloss")
    assert sum(line.startswith("test AUC") for line in lines) == 1
    assert not any("/" in line and "|" in line for line in lines)  # no progress
    assert lines[-1].split() == ["run", str(tmp_path / "demo")]


def test_training_ends_at_the_auc_that_was_asked_for(tmp_path: Path) -> None:
    run(tmp_path, *with_set(*SMALL, "train.eval_every=2", "train.stop_at_auc=0.3"), world_size=1)
    assert [(line["step"], line["split"]) for line in metrics(tmp_path / "demo")] == [
        (2, "train"),
        (2, "validation"),
        (2, "test"),
    ]


def test_training_ends_when_validations_get_no_better(tmp_path: Path) -> None:
    rates = ("optimizer.sparse.lr=0.5", "optimizer.dense.lr=0.05")  # overfits soon
    run(tmp_path, *with_set(*SMALL, *rates, "train.epochs=6", "train.eval_every=4", "train.patience=2"), world_size=1)
    *lines, test = metrics(tmp_path / "demo")
    loss = [line["logloss"] for line in lines if line["split"] == "validation"]
    best = loss.index(min(loss))
    assert best < len(loss) - 1 == best + 2
    assert all(min(loss[i : i + 2]) < min(loss[:i]) for i in range(1, best))
    assert test["step"] < lines[-1]["step"] < 6 * 21


def test_epochs_follow_one_another_in_different_orders(tmp_path: Path) -> None:
    run(tmp_path, *with_set(*SMALL, "train.epochs=2", "train.log_every=11"))
    lines = metrics(tmp_path / "demo")
    assert [(line["step"], line["split"]) for line in lines[:-1]] == [
        *((11, "train"), (11, "validation"), (22, "train"), (22, "validation"))
    ]
    assert lines[2]["logloss"] < lines[0]["logloss"]


def test_the_demo_learns_what_only_the_ids_tell(tmp_path: Path) -> None:
    run(tmp_path, "--set=data.generator.rows=60000", "--set=train.batch_size=256")
    test = metrics(tmp_path / "demo")[-1]
    assert test["auc"] > test["dense_only_auc"] + 0.6 * (test["best_possible_auc"] - test["dense_only_auc"])
    assert test["ne"] < 0.85
    assert 0.9 < test["calibration"] < 1.1


@pytest.mark.parametrize(
    "optimizer", ["sgd", "rowwise_adagrad", "amsgrad", pytest.param("lamb", marks=pytest.mark.slow)]
)
def test_each_optimizer_trains(tmp_path: Path, optimizer: str) -> None:
    dense = "sgd" if optimizer == "sgd" else "adam"
    names = (f"optimizer.sparse.name={optimizer}", f"optimizer.dense.name={dense}", "optimizer.dense.lr=0.005")
    names += ("train.bf16=true",) if optimizer == "amsgrad" else ()
    if optimizer == "lamb":
        names += tuple(
            f"optimizer.{part}.{key}"
            for part in ("sparse", "dense")
            for key in ("weight_decay=1e-3", "weight_decay_mode=decoupled")
        )
    run(
        tmp_path,
        *with_set(*SMALL, *names, "train.grad_clip=1.0", "schedule.kind=poly", "schedule.decay_steps=10"),
        world_size=1,
    )
    lines = [line for line in metrics(tmp_path / "demo") if line["split"] == "train"]
    assert lines[-1]["logloss"] < lines[0]["logloss"]
    assert lines[-1]["lr"] < lines[0]["lr"]


def test_a_loss_that_is_no_number_ends_the_job_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    rates = ("optimizer.sparse.name=sgd", "optimizer.sparse.lr=1e30", "optimizer.dense.lr=1e-8")
    ranks = start(tmp_path, *with_set(*SMALL, *rates, "train.checkpoint_every=1", "train.log_every=1"))
    codes = ranks.exit_codes()
    assert 0 not in codes
    text = ranks.text()
    assert "NonFiniteLossError: step 2: the loss is " in text
    assert ".weight" in text  # the likely table
    assert "the learning rate is 1e+30" in text
    assert f"the last checkpoint is {tmp_path / 'demo' / 'checkpoints' / 'step_1'}" in text
    assert (tmp_path / "demo" / "checkpoints" / "step_1" / "whole.json").is_file()


def test_guessing_is_said(tmp_path: Path) -> None:
    printed = run(tmp_path, *with_set(*SMALL, "optimizer.dense.lr=100", "train.max_steps=4"), world_size=1)
    assert "is that of guessing" in printed
    assert "dense 100" in printed
    assert re.search(r"the largest is \S+, in (dense|over)_arch\S+", printed)  # the layers whose rate that is
