"""Learning-rate schedules: a factor by step, applied to every parameter group of every optimizer."""

import math
from collections.abc import Iterable
from typing import Any

from launch.sections import ScheduleSection


def factor(schedule: ScheduleSection, step: int) -> float:
    """Returns lr(step) / lr: linear over ``warmup_steps``, 1 until ``decay_start``, then falling over ``decay_steps``.

    ``poly``: (1 - t)², t the share of the decay that is over, as MLPerf's DLRM; ``cosine``: (1 + cos πt) / 2.

    Example:
        >>> schedule = ScheduleSection("poly", warmup_steps=2, decay_start=4, decay_steps=4)
        >>> [round(factor(schedule, step), 3) for step in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.562, 0.25, 0.062, 0.0]
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant" or step < schedule.decay_start:
        return 1.0
    t = min(1.0, (step - schedule.decay_start) / schedule.decay_steps)
    return (1 - t) ** 2 if schedule.kind == "poly" else (1 + math.cos(math.pi * t)) / 2


class Schedule:
    """Sets ``lr`` of all groups of ``optimizers``, which depends on the step alone."""

    def __init__(self, schedule: ScheduleSection, optimizers: Iterable[Any]) -> None:
        self._schedule = schedule
        self._groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self._groups[0][0]["lr"])

    def set(self, step: int) -> None:
        """Sets all learning rates to those of ``step``."""
        value = factor(self._schedule, step)
        for group, base in self._groups:
            group["lr"] = base * value
