"""Runs TorchX on this project's components: its dry runs in this process, its jobs by its command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from torchx.runner import get_runner

ROOT = Path(__file__).parents[1]
COMPONENTS = ROOT / "launch" / "components.py"
# 20 steps of two ranks, in seconds.
SMALL = (
    "--set=data.generator.rows=6000",
    "--set=train.batch_size=128",
    "--set=train.log_every=2",
    "--set=train.checkpoint_every=5",
    "--set=train.eval_every=10",
)


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


def torchx(*args: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``torchx ARGS`` in the checkout; stdout and stderr together."""
    return subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's ``metrics.jsonl`` without what differs from run to run: the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("samples_per_s", 1) > 0 for line in lines)
    return lines


def without_id(text: str) -> str:
    """Replaces the part of a job's name that TorchX makes up."""
    return re.sub(r"\b(dlrm|bench)-[0-9a-z]{10,}", r"\1-ID", text)
