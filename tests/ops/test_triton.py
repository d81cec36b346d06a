"""The Triton kernels against the float64 reference, through Triton's interpreter: what `triton_cases` runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import triton_cases

from tests.interpreted_process import run_interpreted
from torchrec_qr.ops.backends import cpu

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
# They take two minutes; the others take ten seconds together.
SLOW = ("every_warm_up_changes_nothing", *triton_cases.DECAYED_STEPS)


@pytest.fixture(scope="module")
def failures(selected: set[Any]) -> dict[str, str]:
    """Per selected test, the traceback of its failure, or an empty string."""
    names = (name for name in triton_cases.NAMES if name in selected)
    lines = run_interpreted(ROOT / "tests" / "ops" / "triton_cases.py", *names, timeout=500)
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in triton_cases.NAMES]
)
def test_interpreted(name: str, failures: dict[str, str]) -> None:
    if name in triton_cases.AGAINST_CPU and not cpu.available():
        pytest.skip("the CPU kernels are not built")
    assert name in failures
    assert not failures[name], failures[name]
