"""Methods compared by the log loss of the days that they were tested on."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.statements import half_width

# Tested days by which the learning rate of a method is chosen; the later ones count.
SEARCHED_DAYS = 2
_mean = statistics.fmean


@dataclass(frozen=True)
class Compared:
    """The difference of the mean log loss of two methods, seed by seed; below 0 the left one is better."""

    mean: float
    bound: float

    @property
    def outcome(self) -> str:
        """``wins``, ``loses``, or ``undecided`` where the interval at 95 % (one-sided) has 0 in it."""
        if self.mean + self.bound < 0:
            return "wins"
        return "loses" if self.mean - self.bound > 0 else "undecided"


def chosen_rate(runs: Iterable[Mapping[str, Any]]) -> float:
    """Returns the learning rate that does best on the first tested days, with seed 0, for the later days and seeds."""
    searched = {run["rate"]: _mean(run["logloss"][:SEARCHED_DAYS]) for run in runs if run["seed"] == 0}
    return min(searched, key=lambda rate: searched[rate])


class Runs:
    """The runs of a method in a budget, by seed, at the learning rate that is chosen for it."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        rate = chosen_rate(runs)
        self.by_seed = {run["seed"]: run for run in runs if run["rate"] == rate}
        self.any = self.by_seed[0]

    def mean(self, number: str) -> tuple[float, float]:
        """Returns the mean over the days after those of the search and over seeds, and the deviation over seeds."""
        values = [_mean(run[number][SEARCHED_DAYS:]) for run in self.by_seed.values()]
        return _mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def above(self, other: "Runs") -> list[float]:
        """Returns the log loss of the days after those of the search less that of ``other``, seed by seed."""
        return [
            _mean(self.by_seed[seed]["logloss"][SEARCHED_DAYS:]) - _mean(other.by_seed[seed]["logloss"][SEARCHED_DAYS:])
            for seed in sorted(self.by_seed.keys() & other.by_seed.keys())
        ]

    def by_day(self) -> list[float]:
        """Returns the log loss of each tested day, the mean over seeds."""
        return [_mean(day) for day in zip(*(run["logloss"] for run in self.by_seed.values()), strict=True)]


def compared(left: Runs, right: Runs) -> Compared | None:
    """Returns the comparison of two methods; None if they have less than two seeds in common."""
    differences = left.above(right)
    return Compared(_mean(differences), half_width(differences)) if len(differences) > 1 else None
