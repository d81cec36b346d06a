"""Runs a whole job on poison and on gloo, and compares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from poison_compare import assert_same_order
from poison_group import JOURNAL, Collective, register
from ranks import run_ranks
from torch import Tensor

Values = dict[str, Tensor]


@dataclass
class Report:
    """The end of a job on one rank. Its values are arrays, because a tensor's memory would go with its process."""

    values: dict[str, Any]
    issued: list[Collective]
    violations: list[str]


def reported(rank: int, world_size: int, job: Callable[..., Values], args: tuple[Any, ...]) -> Report:
    """Runs on a rank."""
    JOURNAL.clear()
    values = job(rank, world_size, *args)
    arrays = {name: value.detach().double().numpy().copy() for name, value in values.items()}
    return Report(arrays, list(JOURNAL.issued), list(JOURNAL.violations))


def on_poison_as_on_gloo(job: Callable[..., Values], world_size: int, *args: Any) -> list[Values]:
    """Returns what a job comes to on each rank, ``job(rank, world_size, *args)``; four ranks are two nodes.

    Asserts that all values are finite and gloo's to the bit, that tensors under way are left alone, and that ranks
    issue their collectives in one order.
    """
    plain, poisoned = (
        run_ranks(reported, world_size, job, args, local_world_size=min(world_size, 2), backend=backend)
        for backend in ("gloo", register)
    )
    for rank, (found, expected) in enumerate(zip(poisoned, plain, strict=True)):
        assert found.violations == []
        assert found.values.keys() == expected.values.keys()
        for name, value in expected.values.items():
            assert np.isfinite(value).all(), f"rank {rank}, {name}, on gloo"
            assert np.isfinite(found.values[name]).all(), f"rank {rank}, {name}: computed from what had not arrived"
            assert np.array_equal(found.values[name], value), f"rank {rank}, {name}: not as on gloo"
    assert_same_order([report.issued for report in poisoned])
    return [{name: torch.from_numpy(value) for name, value in report.values.items()} for report in poisoned]


def by_step(what: str, outputs: list[Tensor]) -> Values:
    return {f"{what}, step {i}": out.detach() for i, out in enumerate(outputs)}
