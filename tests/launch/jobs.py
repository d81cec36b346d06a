"""Runs jobs on real ranks: one process each, one thread each, that a test may signal."""

import multiprocessing as mp
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.local_ranks import free_port

# Ranks are forked from a server that has imported the stack once: importing it takes longer than most tests.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["launch.train", "benchmarks.step"])
_TIMEOUT = 120.0

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
# The demo, small: 10 steps of two ranks.
SMALL = ("data.generator.rows=6000", "train.batch_size=256", "train.eval_batch_size=256", "train.log_every=2")


@dataclass
class Ranks:
    """The processes of a job, and where they write what they print."""

    processes: list[BaseProcess]
    outputs: list[Path]

    def __iter__(self) -> Iterator[BaseProcess]:
        return iter(self.processes)

    def exit_codes(self, timeout: float = _TIMEOUT) -> list[int | None]:
        """Waits for all to end; kills those that do not."""
        deadline = monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def wait_until(self, condition: Callable[[], bool], timeout: float = _TIMEOUT) -> None:
        """Returns when ``condition()`` holds; raises if the job ends, or the time does, before."""
        deadline = monotonic() + timeout
        while not condition():
            for process in self.processes:
                process.join(0.005)
                assert process.exitcode is None, self.text()
            assert monotonic() < deadline, self.text()

    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs)


def start(
    folder: Path,
    *arguments: str,
    world_size: int = 2,
    config: Path = DEMO,
    max_file_bytes: int = 0,
    prepare: Callable[[int], None] | None = None,
) -> Ranks:
    """Starts the ranks of a job whose runs lie in ``folder``.

    Args:
        max_file_bytes: as if the disk were that full.
        prepare: called with the rank in each process, before the job.
    """
    argv = ["--config", str(config), "--runs", str(folder), *arguments]
    return start_ranks(partial(_train, argv, prepare), folder, world_size, max_file_bytes)


def start_ranks(main: Callable[[], Any], folder: Path, world_size: int, max_file_bytes: int = 0) -> Ranks:
    """Starts processes that call ``main`` and exit with what it returns. Each has the variables of a rank."""
    folder.mkdir(exist_ok=True, parents=True)
    port = free_port()
    ranks = Ranks([], [folder / f"output_{rank}.txt" for rank in range(world_size)])
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = _CONTEXT.Process(
            target=_rank, args=(environment, main, ranks.outputs[rank], max_file_bytes), daemon=True
        )
        process.start()
        ranks.processes.append(process)
    return ranks


def run(folder: Path, *arguments: str, **how: Any) -> str:
    """Runs a job to its end, which must be a good one; returns what its ranks printed."""
    ranks = start(folder, *arguments, **how)
    codes = ranks.exit_codes()
    assert codes == [0] * len(codes), ranks.text()
    return ranks.text()


def refused(folder: Path, *arguments: str, **how: Any) -> list[str]:
    """Runs a job that must end by an error on every rank; returns what each printed, without a traceback."""
    ranks = start(folder, *arguments, **how)
    codes = ranks.exit_codes()
    assert codes == [1] * len(codes), ranks.text()
    assert "--traceback" in arguments or "Traceback" not in ranks.text()
    return [output.read_text() for output in ranks.outputs]


def with_set(*assignments: str) -> tuple[str, ...]:
    return tuple(f"--set={assignment}" for assignment in assignments)


def _train(argv: list[str], prepare: Callable[[int], None] | None) -> None:
    from launch.train import main

    if prepare is not None:
        prepare(int(os.environ["RANK"]))
    main(argv)


def _rank(environment: dict[str, str], main: Callable[[], Any], output: Path, max_file_bytes: int) -> None:
    os.environ.update(environment)
    with output.open("w", buffering=1) as text:
        os.dup2(text.fileno(), 1)
        os.dup2(text.fileno(), 2)
        sys.stdout = sys.stderr = text
        if max_file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        import torch

        torch.set_num_threads(1)
        try:
            code = main()
        except Exception:
            traceback.print_exc()
            text.flush()
            os._exit(1)
        sys.exit(code)
