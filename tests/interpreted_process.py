"""Runs a script with Triton's interpreter, in a process of its own: it is chosen when kernels are imported."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def run_interpreted(script: Path, *arguments: str, timeout: float) -> list[str]:
    """Returns the lines that a script of the tests prints.

    Raises:
        AssertionError: its exit code is not 0; the message is what it wrote to stderr.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), str(_ROOT / "tests"), *inherited])
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
