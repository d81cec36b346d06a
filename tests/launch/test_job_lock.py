"""Two jobs and one folder: which one has it, and what becomes of the other."""

import os
import signal
from pathlib import Path

import pytest

from tests.launch.jobs import SMALL, Ranks, refused, run, start, with_set
from tests.run_metrics import metrics

FOUR = with_set(*SMALL, "train.checkpoint_every=4", "train.eval_every=4")  # 11 steps in all


def contents(root: Path) -> dict[str, bytes]:
    """Returns all files but those of locks, and of TensorBoard, of which every job has its own."""
    others = (path for path in root.rglob("*") if not path.name.startswith(("lock.", "events.")))
    files = (path for path in others if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def tell(ranks: Ranks, number: signal.Signals) -> None:
    for process in ranks:
        os.kill(process.pid or 0, number)


def test_a_second_job_is_refused_on_every_rank_and_touches_nothing(tmp_path: Path) -> None:
    first = start(tmp_path / "runs", *FOUR)
    root = tmp_path / "runs" / "demo"
    first.wait_until(lambda: any(line["step"] == 2 for line in metrics(root)))
    tell(first, signal.SIGSTOP)
    before = contents(root)
    texts = refused(tmp_path / "second", *FOUR, "--runs", str(tmp_path / "runs"))
    assert contents(root) == before
    expected = f"RunInUseError: {root} is in use by process {first.processes[0].pid} on {os.uname().nodename}, which "
    for text in texts:
        (line,) = (line for line in text.splitlines() if "Error" in line)
        assert line.startswith(expected)
    tell(first, signal.SIGCONT)
    assert first.exit_codes() == [0, 0]
    steps = [(line["split"], line["step"]) for line in metrics(root)]
    assert len(steps) == len(set(steps))
    assert not list(root.parent.glob("demo.*"))


def test_a_job_that_was_silent_stops_before_it_writes_a_checkpoint(tmp_path: Path) -> None:
    slow = with_set(*SMALL, "data.generator.rows=60000", "train.checkpoint_every=10")
    first = start(tmp_path / "runs", *slow)
    root = tmp_path / "runs" / "demo"
    first.wait_until(lambda: any(line["step"] >= 2 for line in metrics(root)))
    tell(first, signal.SIGSTOP)
    while list(root.glob("*/part_*")):  # in the middle of a checkpoint, which is lost with the folder
        tell(first, signal.SIGCONT)
        first.wait_until(lambda: not list(root.glob("*/part_*")))
        tell(first, signal.SIGSTOP)
    (lock,) = root.glob("lock.*")
    os.utime(lock, (0, 0))  # as if it had been stopped for long
    second = start(tmp_path / "second", *slow, "--runs", str(tmp_path / "runs"))
    assert second.exit_codes() == [0, 0], second.text()
    ended = contents(root)
    tell(first, signal.SIGCONT)
    assert first.exit_codes() == [1, 1]
    for output in first.outputs:
        assert f"RunInUseError: {root} is in use by another job, which took it over: process" in output.read_text()
    assert contents(root) == ended


@pytest.mark.slow
def test_a_run_that_ended_is_moved_aside_with_its_lock(tmp_path: Path) -> None:
    run(tmp_path, *FOUR)
    ended = contents(tmp_path / "demo")
    assert "is now" in run(tmp_path, *FOUR)
    assert contents(tmp_path / "demo.1") == ended
    for folder in ("demo", "demo.1"):
        (lock,) = (tmp_path / folder).glob("lock.*")
        assert '"released": true' in lock.read_text()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_foreign_file_in_place_of_the_folder(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "demo").write_text("mine")
    expected = (
        f"RunFolderError: {tmp_path / 'demo'}: a file of another kind lies there; allowed: a folder, or nothing\n"
    )
    for text in refused(tmp_path, *FOUR, world_size=world_size):
        assert text.endswith(expected)
    assert (tmp_path / "demo").read_text() == "mine"


def become_nobody(rank: int) -> None:
    """Root may write everywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o555)
    for text in refused(tmp_path / "outputs", *FOUR, "--runs", str(runs), prepare=become_nobody):
        assert f"RunFolderError: {runs / 'demo'}: cannot be written: Permission denied\n" in text
