"""Time-outs of a rank that waits for the others: in a step, and in sections that ranks leave at different times."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from launch.sections import TrainSection

GLOO_TIMEOUT = timedelta(minutes=2)
NCCL_TIMEOUT = timedelta(minutes=10)


def step_timeout(train: TrainSection, device: torch.device) -> timedelta:
    """Returns how long a collective of a step may take.

    Args:
        train (TrainSection): of the job; its ``timeout_minutes``, if that is given.
        device (torch.device): of the ranks, which decides the default. A GPU's first collectives wait for compilers of
            other ranks.

    Example:
        >>> step_timeout(TrainSection(), torch.device("cuda", 0)), step_timeout(TrainSection(), torch.device("cpu"))
        (datetime.timedelta(seconds=600), datetime.timedelta(seconds=120))
        >>> step_timeout(TrainSection(timeout_minutes=0.5), torch.device("cpu"))
        datetime.timedelta(seconds=30)
    """
    if train.timeout_minutes is not None:
        return timedelta(minutes=train.timeout_minutes)
    return NCCL_TIMEOUT if device.type == "cuda" else GLOO_TIMEOUT


class Waits:
    """The time-outs of a job's process groups, and a group of all ranks that lives on the hosts.

    A checkpoint, or a vocabulary, may take one rank tens of minutes longer than another. The others then wait in
    `patient` sections, by gloo on the host for every device. A rank that dies there is noticed at once, as its
    connections close, and no kernel spins on a GPU.

    All ranks must make it together, in a process group.

    Args:
        train (TrainSection): of the job.
        device (torch.device): of this rank.

    Attributes:
        step (timedelta): the time-out of a step's collectives.
        slow (timedelta): that of patient sections.
        group (ProcessGroup): of all ranks, on gloo.
    """

    def __init__(self, train: TrainSection, device: torch.device) -> None:
        self.step = step_timeout(train, device)
        self.slow = max(self.step, timedelta(minutes=train.slow_timeout_minutes))
        group = dist.new_group(backend="gloo", timeout=self.step)
        assert group is not None
        self.group: dist.ProcessGroup = group

    def meet(self) -> None:
        """Waits for all ranks, on the hosts."""
        # Call no barrier, because that would go to the GPU to which the process group has bound the ranks.
        dist.all_reduce(torch.zeros(1), group=self.group)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Raises the time-out of all groups, waits for all ranks at the end, and gives all groups that of a step.

        Groups that are made within get the time-out of a step too, as TorchRec's, which would wait for 30 minutes. All
        ranks must enter it. A collective takes the time-out of the moment at which it is called. Such sections do not
        nest.
        """
        _set_everywhere(self.slow)
        try:
            yield
            self.meet()
        finally:
            _set_everywhere(self.step)


def _set_everywhere(timeout: timedelta) -> None:
    # Use private names, because PyTorch lists groups nowhere else, and changes time-outs publicly from 2.14 on.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in distributed_c10d._world.pg_map:
        set_timeout(timeout, group)
