"""Tests for a machine with GPUs, which reuse what tests of a CPU have. Elsewhere they are a rehearsal on the CPU.

``TORCHREC_QR_GPU_TESTS_DEVICE`` may be "cuda" or "cpu"; by default it is whichever there is. A rehearsal skips
what only a GPU can do.
"""

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "distributed"), str(_TESTS / "ops"), str(_TESTS)]

from gpu_setups import DEVICE  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "only_on_cuda" in item.keywords and DEVICE != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: this is a rehearsal on the CPU"))
