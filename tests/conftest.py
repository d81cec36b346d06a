"""Every test starts with few threads, seeded generators, and Hypothesis examples that CI can repeat."""

import os
from typing import Any

# This must come before torch is imported: with pytest-xdist, workers times threads would exceed the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# A busy machine is slow, not wrong. CI runs the same examples each time, so that a failure there is the change's own.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> set[Any]:
    """Values of parameters of the module's selected tests, for a program that runs all of their cases at once."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return {value for spec in specs if spec is not None for value in spec.params.values()}


@pytest.fixture(autouse=True)
def seed() -> None:
    """Makes each test's random numbers its own, whatever ran before it."""
    torch.manual_seed(0)
