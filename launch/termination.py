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
    """Lets all ranks agree, at the same step, that some rank got a signal, or that the job has lost its folder.

    The ranks' flags are reduced while the next step runs, on the host alone, so that no rank and no device waits. The
    decision comes a step late. A second SIGINT ends the process at once.

    Args:
        group (ProcessGroup): of all ranks, on gloo.
        lost (Callable[[], bool]): returns whether another job has the folder, as far as this rank has seen.
    """

    def __init__(self, group: dist.ProcessGroup, lost: Callable[[], bool]) -> None:
        self._group, self._lost = group, lost
        self._signal = 0  # the last one that this rank got
        self._flag = torch.zeros(1)
        self._reduced: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        _end_at_second_interrupt()

    def agreed(self) -> int:
        """Returns the signal that any rank had got at its previous call, or 0; more than any if the folder is lost.

        All ranks must call it at every step.
        """
        if self._reduced is not None:
            self._reduced.wait()
        agreed = int(self._flag)
        self._flag = torch.tensor([float(_LOST if self._lost() else self._signal)])
        self._reduced = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed

    def _note(self, number: int, _: object) -> None:
        self._signal = number


@functools.cache
def _end_at_second_interrupt() -> None:
    """Starts a thread that sees signals at once: the main thread handles none while it waits for other ranks."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Unset it in a forked process, because a signal to that is none to this one.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        interrupts = 0
        while interrupts < 2:
            interrupts += os.read(reading, 1) == bytes([signal.SIGINT])
        os._exit(128 + signal.SIGINT)

    threading.Thread(target=watch, name="second interrupt", daemon=True).start()
