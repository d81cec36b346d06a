"""SIGTERM and SIGINT, which may reach ranks at different steps, as one decision of all ranks at the same step."""

import functools
import os
import signal
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

_LOST = signal.NSIG  # above all signals


class Terminated(SystemExit):
    """A signal came. Its exit code is the one by which a shell reports the signal: 143 of SIGTERM, 130 of SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Termination:
    """Tells all ranks, at the same step, that some rank was told to end, or that the job has lost its folder.

    The ranks' flags are reduced while the next step runs, on the host alone: no rank waits, and no device. So the
    decision comes a step late. A second SIGINT ends the process at once.

    Args:
        group: of all ranks, on gloo.
        lost: returns whether this rank knows that another job has the folder.
    """

    def __init__(self, group: dist.ProcessGroup, lost: Callable[[], bool]) -> None:
        self._group, self._lost = group, lost
        self._told = 0  # the signal
        self._flag = torch.zeros(1)
        self._reduced: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._tell)
        _end_at_second_interrupt()

    def agreed(self) -> int:
        """Returns the signal that any rank had got at its previous call, or 0; more than any if the folder is lost.

        All ranks must call it at every step.
        """
        if self._reduced is not None:
            self._reduced.wait()
        agreed = int(self._flag)
        self._flag = torch.tensor([float(_LOST if self._lost() else self._told)])
        self._reduced = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed

    def _tell(self, number: int, _: object) -> None:
        self._told = number


@functools.cache
def _end_at_second_interrupt() -> None:
    """Starts a thread that sees signals at once: the main thread handles none while it waits for other ranks."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A signal to a process that this one forks is none to this one.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(reading, 1) == bytes([signal.SIGINT])
        os._exit(128 + signal.SIGINT)

    threading.Thread(target=watch, name="second interrupt", daemon=True).start()
