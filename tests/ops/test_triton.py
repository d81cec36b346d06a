"""The Triton kernels against the float64 reference, through Triton's interpreter: what `triton_cases` runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton_cases

from torchrec_qr.ops.backends import cpu

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
# They take two minutes; the others take ten seconds together.
SLOW = ("every_warm_up_changes_nothing", *triton_cases.DECAYED_STEPS)


@pytest.fixture(scope="module")
def failures(selected: set[Any]) -> dict[str, str]:
    """Per selected test, the traceback of its failure, or an empty string."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *inherited])
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "ops" / "triton_cases.py", *(n for n in triton_cases.NAMES if n in selected)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in triton_cases.NAMES]
)
def test_interpreted(name: str, failures: dict[str, str]) -> None:
    if name in triton_cases.AGAINST_CPU and not cpu.available():
        pytest.skip("the CPU kernels are not built")
    assert name in failures
    assert not failures[name], failures[name]
