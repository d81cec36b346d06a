"""Runs TorchX on this project's components: its dry runs in this process, its jobs by its command."""

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from torchx.runner import get_runner

ROOT = Path(__file__).parents[1]
COMPONENTS = ROOT / "launch" / "components.py"
# 67 steps of two ranks, in seconds.
SMALL = (
    "--set=data.generator.rows=20000",
    "--set=train.batch_size=128",
    "--set=train.log_every=5",
    "--set=train.checkpoint_every=10",
    "--set=train.eval_every=40",
)
SMALL_STEPS = 67


def dryrun(
    scheduler: str, component: str, *args: str, cfg: dict[str, Any] | None = None, workspace: Path | None = None
) -> Any:
    """Returns what TorchX would submit."""
    with get_runner() as runner:
        return runner.dryrun_component(
            f"{COMPONENTS}:{component}",
            list(args),
            scheduler,
            cfg=cfg,
            workspace=f"file://{workspace}" if workspace else None,
        )


@contextmanager
def started(*command: str, within: Sequence[str] = (), **environment: str) -> Iterator[Popen[str]]:
    """Runs ``WITHIN python -m COMMAND`` in the checkout, its output in one pipe; ends it if that has not ended."""
    process = Popen(
        [*within, sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def output_of(*command: str, **environment: str) -> tuple[int, str]:
    """Returns exit code and output of ``python -m COMMAND``."""
    with started(*command, **environment) as process:
        output, _ = process.communicate()
        return process.returncode, output


def torchx(*args: str, **environment: str) -> tuple[int, str]:
    """Returns exit code and output of ``torchx ARGS``."""
    return output_of("torchx.cli.main", *args, **environment)


def dlrm(scheduler: str, runs: Path, *args: str) -> tuple[str, ...]:
    """Returns the command of the small demo job, for `started` and `output_of`; ``args`` are options of ``dlrm``."""
    job = ("--config", "configs/demo.yaml", "--runs", str(runs), *args, "--", *SMALL)
    return ("torchx.cli.main", "run", *scheduler.split(), f"{COMPONENTS}:dlrm", *job)


def output_though_rank_1_dies(scheduler: str, runs: Path, *args: str) -> str:
    """Runs `dlrm` on two ranks, one of which is killed when step 35 is logged; returns all output, to its good end."""
    lines, killed = [], False
    with started(*dlrm(scheduler, runs, "-j", "1x2", "--max_retries", "1", *args)) as job:
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line)
            if not killed and re.search(rf" 35/{SMALL_STEPS}  logloss", line):
                os.kill(_pid_of_rank(1, runs), signal.SIGKILL)
                killed = True
        output = "".join(lines)
        assert job.wait() == 0, output
    assert killed, output
    return output


def _pid_of_rank(rank: int, runs: Path) -> int:
    """Returns the process that is this rank of the job whose runs lie there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(runs).encode() in command and f"RANK={rank}".encode() in variables:
            return int(process.name)
    raise LookupError(f"no rank {rank} of a job in {runs}")


def without_id(text: str) -> str:
    """Replaces the part of a job's name that TorchX makes up."""
    return re.sub(r"\b(dlrm|bench)-[0-9a-z]{10,}", r"\1-ID", text)
