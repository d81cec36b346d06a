"""The folder of a run, ``runs/<name>/``: metrics as JSON lines and TensorBoard events, the plan, the config."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class RunFolder:
    """Writes on rank 0; on other ranks it only knows the paths.

    ``metrics.jsonl`` has one object per line: ``step``, ``split`` (train, validation or test) and the numbers. NaN and
    infinities are written as null: they are not JSON.

    Args:
        root: ``runs/<name>``. Where it has a run that came to its end, that is moved to ``<name>.1``, or the next
            number; one that did not is what this run continues.
        rank: of this process.
    """

    def __init__(self, root: Path, rank: int) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.best = root / "best"
        self.moved: Path | None = None
        self._metrics = root / "metrics.jsonl"
        self._writes = rank == 0
        if self._writes:
            if any(line["split"] == "test" for line in self._lines()):
                self.moved = _free(root)
                root.rename(self.moved)
            root.mkdir(parents=True, exist_ok=True)
            self._events = SummaryWriter(str(root / "tensorboard"))

    def write_text(self, name: str, text: str) -> None:
        if self._writes:
            (self.root / name).write_text(text)

    def log(self, step: int, split: str, **numbers: float | int | None) -> None:
        """Appends a line to ``metrics.jsonl``, and the numbers as scalars ``<split>/<name>``."""
        if not self._writes:
            return
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        with self._metrics.open("a") as f:
            f.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self._events.add_scalar(f"{split}/{name}", value, step)

    def drop_after(self, step: int, validated: int) -> None:
        """Forgets what a resumed run will do again: lines after ``step``, and validations after step ``validated``."""
        if not self._writes:
            return
        last = {"train": step, "validation": validated}
        kept = [line for line in self._lines() if line["step"] <= last.get(line["split"], -1)]
        part = self._metrics.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(self._metrics)

    def close(self) -> None:
        if self._writes:
            self._events.close()

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines: the last one may have been cut off."""
        if not self._metrics.exists():
            return []
        text = self._metrics.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _free(root: Path) -> Path:
    number = 1
    while root.with_name(f"{root.name}.{number}").exists():
        number += 1
    return root.with_name(f"{root.name}.{number}")
