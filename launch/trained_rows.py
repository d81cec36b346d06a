"""The rows of an epoch that were trained: how many of those read were malformed, and if any was good."""

from collections.abc import Mapping
from typing import Any

import torch

from launch.data.errors import BadRows, OnBadRow
from launch.data.loader import Batches
from launch.data.split import Split
from launch.metrics import Predictions
from launch.skipped_rows import SkippedRows


class TrainedRows:
    """Counts the malformed rows of an epoch that were trained, and finds out whether any row was good.

    It counts batches that were trained, since a rank reads ahead. A checkpoint keeps the counts.

    Args:
        train (Split): of the job.
        skipped (SkippedRows): of the job.
        policy (OnBadRow): of the job.

    Attributes:
        has_good (bool): True if a row was good so far, or need not be looked for.
    """

    def __init__(self, train: Split, skipped: SkippedRows, policy: OnBadRow) -> None:
        self._train, self._skipped = train, skipped
        self.has_good = policy == "error"
        self._bad_rows = BadRows(policy)
        self._before = 0  # malformed rows of all ranks in this epoch, before a checkpoint from which the job went on
        self._first = 0  # batch of the epoch, from which on this rank has read
        self._malformed: list[int] = []  # rows of each batch since then
        self._counted: tuple[int, dict[str, int]] | None = None  # the latest batch before which `count` counted

    def start(self, batch: int, batches: Batches) -> None:
        """Goes on with ``batches``, which are those of an epoch from ``batch`` on."""
        if batch == 0:
            self._before = 0
        self._first, self._malformed, self._bad_rows = batch, batches.malformed, batches.bad_rows
        self._counted = None

    def count(self, batch: int) -> dict[str, int]:
        """Counts malformed rows of the epoch before ``batch``; all ranks must call it."""
        # Count each batch once, because ranks wait for one another here.
        if self._counted is None or self._counted[0] != batch:
            of_rank = sum(self._malformed[: max(batch - self._first, 0)])
            self._counted = batch, self._skipped.count(self._train, self._bad_rows, of_rank, self._before)
        return self._counted[1]

    def look_for_good(self, predictions: Predictions, device: torch.device) -> None:
        """Finds out whether any row was good; all ranks must call it."""
        if not self.has_good:
            self.has_good = predictions.gather(device)[0].numel() > 0

    def require_good(self) -> None:
        """Raises DataError if no row was good."""
        self._bad_rows.require_good(int(self.has_good), f"the {self._train.name} split")

    def state(self, batch: int) -> dict[str, int | bool]:
        """Returns what a checkpoint before ``batch`` keeps; all ranks must call it."""
        number = self.count(batch).get("skipped_rows", 0) if batch else 0
        return {"skipped_rows": number, "has_good_rows": self.has_good}

    def load(self, about: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._before, self.has_good = about["skipped_rows"], about["has_good_rows"]
