"""`varied_runs` on a rank, with what it issued by the way."""

from dataclasses import dataclass
from typing import Any

from parity_model import Run, Trained, train
from poison_group import JOURNAL, Collective


@dataclass
class Journaled(Trained):
    """The outcome of a rank, what it issued, and what was done to tensors under way."""

    issued: list[Collective]
    violations: list[str]


def train_journaled(rank: int, world_size: int, run: Run, arguments: dict[str, Any] | None = None) -> Journaled:
    """Runs on a rank, of `varied_runs.sharded` with the arguments."""
    JOURNAL.clear()
    outcome = train(rank, world_size, run, **(arguments or {}))
    return Journaled(**vars(outcome), issued=list(JOURNAL.issued), violations=list(JOURNAL.violations))


def train_all_journaled(
    rank: int, world_size: int, runs: dict[str, Run], arguments: dict[str, Any] | None = None
) -> dict[str, Journaled]:
    """Runs on a rank."""
    return {name: train_journaled(rank, world_size, run, arguments) for name, run in runs.items()}
