"""``torchrec-qr`` without a command, and before it imports anything that takes long."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_help_is_instant() -> None:
    slow = {"torch", "torchrec", "numpy", "fbgemm_gpu"}
    code = f"import sys, torchrec_qr.cli.commands; print(sorted({slow} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
        == "[]\n"
    )


def test_command_is_required() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "torchrec_qr.cli"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 2
    assert result.stderr.endswith("the following arguments are required: COMMAND\n")
