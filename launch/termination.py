"""SIGTERM, which may reach ranks at different steps, as one decision of all ranks at the same step."""

import signal

import torch
import torch.distributed as dist


class Terminated(SystemExit):
    """SIGTERM came. Exit code 143, as a shell reports that signal."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Termination:
    """Tells all ranks, at the same step, that some rank was told to end.

    The ranks' flags are reduced while the next step runs, on the host alone: no rank waits, and no device. So the
    decision comes a step late.

    Args:
        group: of all ranks, on gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._told = False
        self._flag = torch.zeros(1)
        self._reduced: dist.Work | None = None
        signal.signal(signal.SIGTERM, self._tell)

    def agreed(self) -> bool:
        """Returns whether any rank had been told at its previous call. All ranks must call it at every step."""
        if self._reduced is not None:
            self._reduced.wait()
        agreed = bool(self._flag)
        self._flag = torch.tensor([float(self._told)])
        self._reduced = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return agreed

    def _tell(self, *_: object) -> None:
        self._told = True
