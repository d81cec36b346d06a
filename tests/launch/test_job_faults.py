"""A job that was interrupted goes on from its last checkpoint."""

import json
import os
import random
import re
import signal
from pathlib import Path
from time import monotonic

import pytest
import torch

from tests.launch.jobs import SMALL, Ranks, refused, run, start, with_set
from tests.run_metrics import forget_the_end, metrics

FOUR = with_set(*SMALL, "train.checkpoint_every=4", "train.eval_every=4")  # steps a checkpoint; 11 steps in all


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, *FOUR)
    return folder


def checkpoints(folder: Path) -> set[str]:
    return {p.parent.name for p in (folder / "demo" / "checkpoints").glob("step_*/whole.json")}


def test_a_job_whose_rank_was_killed_continues_bit_for_bit(tmp_path: Path, unbroken: Path) -> None:
    ranks = start(tmp_path, *FOUR)
    # Step 6 has been logged, and the checkpoint is that of step 4: two batches are trained again.
    ranks.wait_until(lambda: any(line["step"] == 6 for line in metrics(tmp_path / "demo")))
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
    codes = ranks.exit_codes(timeout=30)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1  # ended by itself, and soon: its peer is gone
    printed = run(tmp_path, *FOUR)
    assert "continues at step 4" in printed or "continues at step 8" in printed
    assert metrics(tmp_path / "demo") == metrics(unbroken / "demo")


@pytest.mark.slow
def test_four_ranks_continue_bit_for_bit(tmp_path: Path) -> None:
    """From three ranks on, sums of gradients depend on the order of their parts."""
    stop = "--set=train.max_steps=4"
    steps = (*FOUR, "--set=train.batch_size=128")
    for folder, stops in ((tmp_path / "whole", ()), (tmp_path / "stopped", (stop,)), (tmp_path / "stopped", ())):
        printed = run(folder, *steps, *stops, world_size=4)
        if stops:
            forget_the_end(folder / "demo")
    assert "continues at step 4" in printed
    assert metrics(tmp_path / "stopped" / "demo") == metrics(tmp_path / "whole" / "demo")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_writes_a_checkpoint_and_ends_as_a_shell_says(
    number: int, code: int, tmp_path: Path, unbroken: Path
) -> None:
    ranks = start(tmp_path, *FOUR)
    ranks.wait_until(lambda: any(line["step"] == 2 for line in metrics(tmp_path / "demo")))
    os.kill(ranks.processes[1].pid or 0, number)  # one rank gets the signal; all end at the same step
    assert ranks.exit_codes(timeout=30) == [code, code]
    assert checkpoints(tmp_path)
    assert "continues at step" in run(tmp_path, *FOUR)
    assert metrics(tmp_path / "demo") == metrics(unbroken / "demo")


def test_a_second_sigint_ends_a_rank_that_waits_for_others(tmp_path: Path) -> None:
    ranks = start(tmp_path, *FOUR)
    ranks.wait_until(lambda: any(line["step"] == 2 for line in metrics(tmp_path / "demo")))
    first, second = ranks.processes
    os.kill(second.pid or 0, signal.SIGSTOP)
    deadline = monotonic() + 30
    while first.exitcode is None and monotonic() < deadline:
        os.kill(first.pid or 0, signal.SIGINT)
        first.join(0.01)
    assert first.exitcode == 130
    ranks.kill()


def test_a_checkpoint_that_was_being_written_is_not_used(tmp_path: Path, unbroken: Path) -> None:
    every_step = with_set(*SMALL, "train.checkpoint_every=1", "train.eval_every=4")
    ranks = start(tmp_path, *every_step)
    whole = _kill_while_writing(ranks, tmp_path / "demo" / "checkpoints")
    printed = run(tmp_path, *every_step)
    assert f"continues at step {whole}, from" in printed
    assert metrics(tmp_path / "demo") == metrics(unbroken / "demo")


def _kill_while_writing(ranks: Ranks, folder: Path) -> int:
    """Kills all ranks between the first and the last byte of a checkpoint; returns the step of the one before."""

    def being_written() -> bool:
        if not list(folder.glob("step_*/whole.json")) or not list(folder.glob("part_*")):
            return False
        for process in ranks:
            os.kill(process.pid or 0, signal.SIGSTOP)
        if list(folder.glob("part_*/state")) and not list(folder.glob("part_*/whole.json")):
            return True
        for process in ranks:
            os.kill(process.pid or 0, signal.SIGCONT)
        return False

    ranks.wait_until(being_written)
    ranks.kill()
    return max(int(p.parent.name.removeprefix("step_")) for p in folder.glob("step_*/whole.json"))


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_is_intact(tmp_path: Path, unbroken: Path) -> None:
    run(tmp_path, *FOUR, "--set=train.max_steps=4")
    forget_the_end(tmp_path / "demo")
    for text in refused(tmp_path, *FOUR, max_file_bytes=50_000):
        assert re.search(r"^CheckpointError: cannot write .*File too large", text, re.MULTILINE)
    assert checkpoints(tmp_path) == {"step_4"}
    run(tmp_path, *FOUR)
    assert metrics(tmp_path / "demo") == metrics(unbroken / "demo")


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_job_continues_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    # The same rows a step: so the step count means the same.
    def steps(ranks: int) -> tuple[str, ...]:
        sizes = (f"train.batch_size={256 // ranks}", f"train.eval_batch_size={256 // ranks}")
        return with_set("data.generator.rows=6000", *sizes, "train.checkpoint_every=10", "train.log_every=5")

    stop = "--set=train.max_steps=10"
    validations = []
    for world_size in (before, after):
        # The second job has no step left to do: what it validates is what it has loaded.
        printed = run(tmp_path, *steps(world_size), stop, world_size=world_size)
        validations += [line for line in metrics(tmp_path / "demo") if line.pop("split") == "validation"]
        forget_the_end(tmp_path / "demo")
    assert "continues at step 10" in printed
    assert validations[1] == pytest.approx(validations[0], rel=1e-5)
    printed = run(tmp_path, *steps(after), world_size=after)
    dealt = f"{before} ranks in 10 batches of {256 // before}, then {after} ranks in 11 batches of {256 // after}"
    assert f"epoch 0: 5,143 rows were trained by {dealt}, each row once" in printed
    lines = metrics(tmp_path / "demo")
    assert [line["step"] for line in lines if line["split"] == "train"] == [5, 10, 15, 20]
    assert lines[-2]["step"] == 21
    assert lines[-2]["logloss"] < validations[0]["logloss"]


@pytest.mark.slow
def test_rows_that_were_trained_twice_end_the_job(tmp_path: Path) -> None:
    run(tmp_path, *FOUR, "--set=train.max_steps=8")
    forget_the_end(tmp_path / "demo")
    whole = tmp_path / "demo" / "checkpoints" / "step_8" / "whole.json"
    about = json.loads(whole.read_text())
    assert about["trained"]["rows"] == 8 * 2 * 256
    whole.write_text(json.dumps(about | {"deals": [{"world_size": 2, "batch_size": 256, "batches": 7}]}))
    for text in refused(tmp_path, *FOUR):
        assert "EpochError: epoch 0: 5,655 rows were trained by 2 ranks in 11 batches of 256; allowed: each" in text


@pytest.mark.slow
def test_rows_in_another_order_within_an_epoch_are_said(tmp_path: Path) -> None:
    run(tmp_path, *FOUR, "--set=train.max_steps=8")
    forget_the_end(tmp_path / "demo")
    printed = run(tmp_path, *FOUR, "--set=train.seed=1")
    assert "epoch 0 was begun with its rows in another order (train.seed: saved 0, here 1): some may be" in printed
    (last,) = (tmp_path / "demo" / "checkpoints").glob("step_11/whole.json")
    assert not json.loads(last.read_text())["ended"]["each_row_once"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path, *FOUR, "--set=train.max_steps=4", world_size=1)
    forget_the_end(tmp_path / "demo")
    change = with_set("tables[0].partitions.num_collisions=5", "model.top_mlp=[128,32]")
    (text,) = refused(tmp_path, *FOUR, *change, world_size=1)
    assert "step_4 is of another model" in text
    assert "tables.cat_0.partitions.num_collisions: saved 4, here 5" in text
    assert "model.top_mlp: saved [128, 64], here [128, 32]" in text
    assert "--name" in text


def test_random_states_are_part_of_a_checkpoint(tmp_path: Path, unbroken: Path) -> None:
    saved = torch.load(unbroken / "demo" / "checkpoints" / "step_8" / "rank_1.pt", weights_only=True)
    generator = torch.Generator()
    generator.set_state(saved["torch"])
    assert generator.initial_seed() == 1  # the job's 0, and the rank
    random.Random().setstate(saved["python"])
