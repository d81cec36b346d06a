"""Errors that a later call raises, because a step on a GPU must not wait for the device.

A check copies its few numbers to the host without waiting. A later call reads them when they have arrived. All checks
of a process are in one queue.
"""

from collections.abc import Callable
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """The methods of ``torch.cuda.Event`` that the queue calls to find whether a copy is complete."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class LateErrors:
    """A queue of checks, the oldest first. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._checks: list[tuple[Callable[[], None], Arrival]] = []

    def __len__(self) -> int:
        return len(self._checks)

    def add(self, check: Callable[[], None], arrived: Arrival) -> None:
        """Adds a check that may raise. Its numbers are on the host after ``arrived``."""
        with self._lock:
            self._checks.append((check, arrived))

    def raise_failed(self, wait: bool) -> None:
        """Calls the checks that have arrived, the oldest first, or all of them if ``wait``.

        The first check that fails raises, and the queue keeps those behind it.
        """
        while (taken := self._take(wait)) is not None:
            check, arrived = taken
            arrived.synchronize()
            check()

    def _take(self, wait: bool) -> tuple[Callable[[], None], Arrival] | None:
        with self._lock:
            # Look past a check that has not arrived, because streams and devices end in any order.
            for i, (_, arrived) in enumerate(self._checks):
                if wait or arrived.query():
                    return self._checks.pop(i)
        return None


_late = LateErrors()


def raise_pending(wait: bool = True) -> None:
    """Raises the oldest error of earlier calls on CUDA that no call has raised yet.

    On CUDA the host does not wait for the device. A later call raises the IndexError of an id outside its table, or
    the ValueError of wrong offsets. Call this function before a checkpoint, after an evaluation, and at the end of
    training. On a CPU each call raises its own errors, and this function returns None.

    Args:
        wait (bool): whether to wait for checks that have not arrived.

    Raises:
        IndexError: an id was outside its table.
        ValueError: offsets decreased, or did not end at the number of ids.

    Example:
        >>> import torchrec_qr
        >>> print(torchrec_qr.raise_pending())
        None
    """
    _late.raise_failed(wait)


def check_later(numbers: Tensor, check: Callable[[Tensor], None]) -> None:
    """Copies ``numbers`` from a GPU to the host, and adds a check that calls ``check`` with the copy."""
    with torch.cuda.device(numbers.device):
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    _late.add(lambda: check(on_host), arrived)
