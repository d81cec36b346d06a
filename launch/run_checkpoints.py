"""Checkpoints of a run, which are whole or not there: written aside, then renamed. The last ones are kept."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from launch.dcp_reader import CheckpointReader
from launch.waits import Waits
from torchrec_qr.distributed import checkpoint as resharding

_WHOLE = "whole.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class Checkpoints:
    """``<root>/step_<n>/``: sharded state by DCP, and ``whole.json`` with the numbers with which every rank goes on.

    Model and optimizer state load under another plan and world size. ``by_rank`` state (random generators) is of use
    only if the world size is the same.

    Ranks meet in the hosts' group, with its long time-out: one may write for minutes longer than another.

    Args:
        root (Path): folder that all ranks see.
        kept (int): how many of the last ones.
        waits (Waits): of the job.
    """

    def __init__(self, root: Path, kept: int, waits: Waits) -> None:
        self._root, self._kept, self._waits = root, kept, waits

    def latest(self) -> Path | None:
        """Returns the newest whole checkpoint. One that was being written when the job died has no ``whole.json``."""
        whole = [p.parent for p in self._root.glob(f"step_*/{_WHOLE}")]
        return max(whole, key=_step, default=None)

    def save(self, step: int, state: dict[str, Any], about: dict[str, Any], by_rank: dict[str, Any]) -> Path:
        """Writes a checkpoint; all ranks must call it. The previous one stays until this one is whole.

        Raises:
            CheckpointError: the disk is full, or the like; on every rank, with what each met.
        """
        target, part = self._root / f"step_{step}", self._root / f"part_{step}"
        with self._waits.patient():
            if dist.get_rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            self._waits.meet()
            free_mib = shutil.disk_usage(part).free / 2**20  # PyTorch's error of a full disk does not name it
            with errors_of_dcp(f"cannot write {part}, where {free_mib:,.1f} MiB were free"):
                dcp.save(without_empty(state), checkpoint_id=str(part / "state"), process_group=self._waits.group)
            torch.save(by_rank, part / f"rank_{dist.get_rank()}.pt")
            self._waits.meet()  # whole only once every rank has written
            if dist.get_rank() == 0:
                with (part / _WHOLE).open("w") as f:
                    json.dump({**about, "step": step, "world_size": dist.get_world_size()}, f)
                    f.flush()
                    os.fsync(f.fileno())
                shutil.rmtree(target, ignore_errors=True)
                part.rename(target)
                self._drop_old()
        return target

    @staticmethod
    def about(checkpoint: Path) -> dict[str, Any]:
        """Returns the ``about`` of `save`, with ``step`` and ``world_size``."""
        about: dict[str, Any] = json.loads((checkpoint / _WHOLE).read_text())
        return about

    @staticmethod
    def load(checkpoint: Path, state: dict[str, Any], waits: Waits) -> None:
        """Fills ``state``, as `save` was given it, in place; see `torchrec_qr.distributed.checkpoint.load`.

        Raises:
            CheckpointError: it does not fit, cannot be read, or would run code; on every rank.
            ValueError: a table of the checkpoint has another meaning here.
        """
        reader = CheckpointReader(checkpoint / "state")
        with waits.patient(), errors_of_dcp(f"cannot load {checkpoint}", reader):
            resharding.load(without_empty(state), storage_reader=reader, process_group=waits.group)

    @staticmethod
    def load_by_rank(checkpoint: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(checkpoint / f"rank_{dist.get_rank()}.pt", weights_only=True)
        return state

    def forget_after(self, step: int) -> None:
        """Removes checkpoints of later steps, which a run that goes on at ``step`` will do again."""
        if dist.get_rank() == 0:
            for later in [p for p in self._root.glob("step_*") if _step(p) > step]:
                shutil.rmtree(later, ignore_errors=True)

    def _drop_old(self) -> None:
        whole = sorted(self._root.glob("step_*"), key=_step)
        for old in [*whole[: -self._kept], *self._root.glob("part_*")]:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def errors_of_dcp(what: str, reader: CheckpointReader | None = None) -> Iterator[None]:
    """Raises DCP's exception as a `CheckpointError` that names the causes.

    DCP's own is no Exception, so that it would pass by all that reports one. Before torch 2.13 it hides a refusal of
    ``reader`` altogether.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()]
        if reader is not None and reader.refusal is not None:
            causes = [str(reader.refusal)]
        raise CheckpointError(f"{what}: {'; '.join(causes)}") from error


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def without_empty(state: Any) -> Any:
    """Drops mappings with nothing in them, which DCP drops when it saves and misses when it loads.

    Example:
        >>> without_empty({"sum": {"t": 1}, "state": {"t": {}}})
        {'sum': {'t': 1}}
    """
    if not isinstance(state, dict):
        return state
    kept = {key: without_empty(value) for key, value in state.items()}
    return {key: value for key, value in kept.items() if value != {} or not isinstance(value, dict)}
