"""One job at a time may write to a run's folder: errors name the lock's holder, and one of several gets it."""

import json
import multiprocessing as mp
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic

import pytest

from launch.run_lock import PERIOD_S, SILENT_PERIODS, Holder, RunInUseError, RunLock

SILENT_S = PERIOD_S * SILENT_PERIODS
ELSEWHERE = replace(Holder.of_this_process(), host="elsewhere", boot="another", job="")


@contextmanager
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def held(root: Path, holder: Holder, age_s: float = 0.0, number: int = 1) -> Path:
    """Makes a lock that another one holds, and whose lease is that old."""
    root.mkdir(exist_ok=True)
    lock = root / f"lock.{number}"
    lock.write_text(json.dumps(asdict(holder)))
    then = lock.stat().st_mtime - age_s
    os.utime(lock, (then, then))
    return lock


def here(process: subprocess.Popen[bytes]) -> Holder:
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    return replace(ELSEWHERE, host="here", boot=Holder.of_this_process().boot, pid=process.pid, started=int(ticks))


def locks(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_second_job_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    root = tmp_path / "run"
    first = RunLock(root)
    before = [(name, (root / name).read_bytes()) for name in locks(root)]
    with pytest.raises(RunInUseError) as caught:
        RunLock(root)
    expected = (
        f"{root} is in use by process {os.getpid()} on {os.uname().nodename}, which renewed its lock 0 s ago; allowed: "
    )
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert [(name, (root / name).read_bytes()) for name in locks(root)] == before
    first.release()
    RunLock(root).release()
    assert locks(root) == ["lock.2"]


def test_a_holder_on_another_host_is_silent_after_a_minute_of_the_file_systems_clock(tmp_path: Path) -> None:
    held(tmp_path, ELSEWHERE, age_s=SILENT_S - 5)
    with pytest.raises(RunInUseError, match=r"on elsewhere, which renewed its lock 5\d s ago"):
        RunLock(tmp_path)
    held(tmp_path, ELSEWHERE, age_s=SILENT_S)
    RunLock(tmp_path).release()


def test_a_holder_on_this_host_that_is_dead_or_whose_number_is_anothers_is_none(tmp_path: Path) -> None:
    with other_process() as process:
        holder = here(process)
        held(tmp_path, holder)
        with pytest.raises(RunInUseError, match=f"process {process.pid} on here"):
            RunLock(tmp_path)
        held(tmp_path, replace(holder, started=holder.started - 1))  # the pid was another process's
        RunLock(tmp_path).release()
        held(tmp_path, holder, number=3)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not collected by its parent
        RunLock(tmp_path).release()
    held(tmp_path, holder, number=5)
    RunLock(tmp_path).release()
    assert locks(tmp_path) == ["lock.6"]


def test_a_job_that_was_started_again_elsewhere_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(tmp_path, replace(ELSEWHERE, job="slurm://torchx/17"))
    for other in ("", "slurm://torchx/18"):
        monkeypatch.setenv("TORCHX_JOB_ID", other)
        with pytest.raises(RunInUseError, match="on elsewhere, job slurm://torchx/17, which renewed"):
            RunLock(tmp_path)
    monkeypatch.setenv("TORCHX_JOB_ID", "slurm://torchx/17")
    first = RunLock(tmp_path)
    with pytest.raises(RunInUseError):  # here the first one is seen to live
        RunLock(tmp_path)
    first.release()


def test_a_lock_that_is_being_made_is_held(tmp_path: Path) -> None:
    (tmp_path / "lock.1").touch()
    with pytest.raises(RunInUseError, match="in use by a job that is starting, which renewed its lock 0 s ago"):
        RunLock(tmp_path)


def test_a_holder_renews_its_lease_and_sees_that_it_lost_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, period_s=0.01)
    file = tmp_path / "lock.1"
    os.utime(file, (0, 0))
    lock.keep()
    until(lambda: file.stat().st_mtime > 0)
    assert not lock.lost
    lock.require()
    held(tmp_path, ELSEWHERE, number=2)
    until(lambda: lock.lost)
    with pytest.raises(RunInUseError, match=f"another job, which took it over: process {os.getpid()} on elsewhere"):
        lock.require()
    lock.release()
    with pytest.raises(RunInUseError, match="on elsewhere"):  # its release did not free the other's
        RunLock(tmp_path)


def test_a_lock_that_was_removed_is_lost(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.require()
    (tmp_path / "lock.1").unlink()
    with pytest.raises(RunInUseError, match=r"its lock\.1 was removed while this job was using it"):
        lock.require()
    lock.release()


def test_a_folder_is_moved_under_its_lock(tmp_path: Path) -> None:
    root, old = tmp_path / "run", tmp_path / "run.1"
    RunLock(root).release()
    lock = RunLock(root)
    lock.move_folder(old)
    assert json.loads((old / "lock.2").read_text())["released"]
    with pytest.raises(RunInUseError):
        RunLock(root)
    RunLock(old).release()
    lock.release()
    assert locks(root) == ["lock.1"]


def test_a_number_that_was_used_meanwhile_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(tmp_path, ELSEWHERE, age_s=SILENT_S)
    is_free = RunLock._is_free

    def and_others_are_quicker(self: RunLock, folder: int, name: str) -> bool:
        free = is_free(self, folder, name)
        if name == "lock.1":  # one took 2 and released it; another took 3, and removed 2
            held(tmp_path, ELSEWHERE, number=3)
        return free

    monkeypatch.setattr(RunLock, "_is_free", and_others_are_quicker)
    with pytest.raises(RunInUseError, match="on elsewhere"):
        RunLock(tmp_path)
    assert locks(tmp_path) == ["lock.1", "lock.3"]


def test_one_of_many_gets_a_free_lock(tmp_path: Path) -> None:
    context = mp.get_context("fork")
    for attempt in range(10):
        root = tmp_path / str(attempt)
        held(root, ELSEWHERE, age_s=SILENT_S)
        ready, ended = context.Barrier(8), context.Barrier(8)
        processes = [context.Process(target=contend, args=(root, ready, ended)) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert sorted(process.exitcode or 0 for process in processes) == [0] + [3] * 7


def contend(root: Path, ready: threading.Barrier, ended: threading.Barrier) -> None:
    ready.wait()
    try:
        lock = RunLock(root)
        code = 0
    except RunInUseError:
        code = 3
    ended.wait()  # no process releases, or dies, before all have tried
    if code == 0:
        lock.require()
    os._exit(code)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = monotonic() + timeout_s
    while not condition():
        assert monotonic() < deadline
        os.sched_yield()
