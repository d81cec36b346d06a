"""The folder of a run, ``runs/<name>/``: metrics as JSON lines and TensorBoard events, the plan, the config."""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from launch.process_group import from_rank_0
from launch.run_lock import RunFolderError, RunInUseError, RunLock
from launch.run_name import refuse_links


class RunFolder:
    """Writes on rank 0; on other ranks it has the paths alone.

    ``metrics.jsonl`` has one object per line: ``step``, ``split`` (train, validation or test) and the numbers. NaN and
    infinities are written as null: they are not JSON.

    Args:
        root (Path): ``runs/<name>``. If it has a run that came to its end, that is moved to ``<name>.1``, or the next
            number. A run that did not is continued.
        rank (int): of this process.

    Raises:
        RunInUseError: another job has the folder; see `launch.run_lock`.
        RunFolderError: the folder cannot be made or written.
    """

    def __init__(self, root: Path, rank: int) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.best = root / "best"
        self.weights = root / "weights"
        self.moved: Path | None = None
        self._metrics = root / "metrics.jsonl"
        self._writes = rank == 0
        if self._writes:
            with writing_errors_named(root):
                refuse_links(root, self.checkpoints, self.best, self.weights, self._metrics)
                self._lock = RunLock(root)
                self._open()

    def _open(self) -> None:
        try:
            if any(line["split"] == "test" for line in self._lines()):
                self.moved = _free(self.root)
                self._lock.move_folder(self.moved)
            self._lock.keep()
            self._events = SummaryWriter(str(self.root / "tensorboard"))
        except BaseException:
            self._lock.release()
            raise

    @property
    def lost(self) -> bool:
        """True if another job has taken the folder, at rank 0's last look."""
        return self._writes and self._lock.lost

    def require(self, group: dist.ProcessGroup) -> None:
        """Looks whether this job still has the folder; all ranks must call it.

        Raises:
            RunInUseError: another job has taken it; on every rank.
        """
        from_rank_0(lambda: self._lock.require(), group, RunInUseError)

    def write_text(self, name: str, text: str) -> None:
        if self._writes:
            with writing_errors_named(self.root / name):
                (self.root / name).write_text(text)

    def keep_file(self, source: Path, within: str) -> str:
        """Copies a file into the folder ``within``, named by its SHA-256; returns its path in the run's folder."""
        with source.open("rb") as file:
            name = f"{within}/{hashlib.file_digest(file, 'sha256').hexdigest()}{source.suffix}"
        if self._writes and not (self.root / name).exists():
            (self.root / within).mkdir(exist_ok=True)
            shutil.copyfile(source, self.root / name)
        return name

    def log(self, step: int, split: str, **numbers: float | int | None) -> None:
        """Appends a line to ``metrics.jsonl``, and the numbers as scalars ``<split>/<name>``.

        A job that has lost the folder writes nothing: it ends at its next step or checkpoint.
        """
        if not self._writes or not self._lock.is_held():
            return
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        with writing_errors_named(self._metrics), self._metrics.open("a") as f:
            f.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self._events.add_scalar(f"{split}/{name}", value, step)

    def drop_after(self, step: int, validated: int) -> None:
        """Drops lines that a resumed run writes again: those after ``step``, and validations after ``validated``."""
        if not self._writes:
            return
        last = {"train": step, "validation": validated}
        kept = [line for line in self._lines() if line["step"] <= last.get(line["split"], -1)]
        part = self._metrics.with_suffix(".part")
        with writing_errors_named(self._metrics):
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(self._metrics)

    def close(self) -> None:
        if self._writes:
            try:
                self._events.close()
            finally:
                self._lock.release()

    def _lines(self) -> list[dict[str, Any]]:
        """Returns the whole lines: the last one may have been cut off."""
        if not self._metrics.exists():
            return []
        text = self._metrics.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def opened_by_all(root: Path, rank: int, group: dist.ProcessGroup) -> RunFolder:
    """Returns the folder of a run, or raises on every rank what rank 0 met. All ranks must call it."""
    of_rank_0: list[RunFolder] = []
    from_rank_0(lambda: of_rank_0.append(RunFolder(root, rank)), group, RunFolderError, ValueError)
    return of_rank_0[0] if of_rank_0 else RunFolder(root, rank)


@contextmanager
def writing_errors_named(path: Path) -> Iterator[None]:
    """Names the file in the error of a write, because the system's own does not."""
    try:
        yield
    except FileExistsError:
        raise RunFolderError(f"{path}: a file of another kind lies there; allowed: a folder, or nothing") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}{where}") from error


def _free(root: Path) -> Path:
    names = (root.with_name(f"{root.name}.{number}") for number in itertools.count(1))
    return next(path for path in names if not os.path.lexists(path))
