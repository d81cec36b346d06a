"""Errors of work on a GPU: kernels and copies leave their verdict on the device, and the host reads it later.

A step must not wait for the device. So a check copies its few numbers to the host without waiting, and is looked at
by a later call, once they have arrived. There is one queue for all checks of a process.
"""

from collections.abc import Callable
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """When a copy to the host is complete: the part of ``torch.cuda.Event`` that is used here."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class LateErrors:
    """Checks whose numbers are on their way to the host, oldest first; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._checks: list[tuple[Callable[[], None], Arrival]] = []

    def __len__(self) -> int:
        return len(self._checks)

    def add(self, check: Callable[[], None], arrived: Arrival) -> None:
        """Adds a check, which raises if something failed; its numbers are on the host once ``arrived``."""
        with self._lock:
            self._checks.append((check, arrived))

    def raise_failed(self, wait: bool) -> None:
        """Runs the checks that have arrived, oldest first (``wait``: all, waiting for each); raises at the first
        that failed, and keeps those behind it."""
        while (taken := self._take(wait)) is not None:
            check, arrived = taken
            arrived.synchronize()
            check()

    def _take(self, wait: bool) -> tuple[Callable[[], None], Arrival] | None:
        with self._lock:
            # Streams and devices end in any order: a check that is still under way holds up no other.
            for i, (_, arrived) in enumerate(self._checks):
                if wait or arrived.query():
                    return self._checks.pop(i)
        return None


_late = LateErrors()


def raise_pending(wait: bool = True) -> None:
    """Raises the oldest error of earlier calls on CUDA that has not been raised yet.

    On CUDA nothing waits for the device, so the IndexError of an id outside of its table, or the ValueError of offsets
    that are none, comes with a later call. Call this before results of a step are used for good: before a checkpoint,
    after an evaluation, and at the end of training. On a CPU errors are raised at once, and nothing is ever pending.

    Args:
        wait: wait for checks that are still under way; otherwise look only at those that have arrived.

    Raises:
        IndexError: an id was outside of its table.
        ValueError: offsets decreased, or did not end at the number of ids.

    Example:
        >>> import torchrec_qr
        >>> torchrec_qr.raise_pending()
    """
    _late.raise_failed(wait)


def check_later(numbers: Tensor, check: Callable[[Tensor], None]) -> None:
    """Has ``check`` called with ``numbers``, which lie on a GPU, once they have reached the host."""
    with torch.cuda.device(numbers.device):
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    _late.add(lambda: check(on_host), arrived)
