"""Malformed rows that a pass over a split leaves out: counted over all ranks, and told."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from launch.data.errors import BadRows, DataError, OnBadRow
from launch.data.loader import Batches
from launch.data.split import Split
from launch.metrics import Predictions


class SkippedRows:
    """Counts of each split's latest pass. All ranks must make the same calls.

    Args:
        say (Callable[[str], None]): prints a line.
        group (ProcessGroup): of all ranks, on the hosts.

    Attributes:
        of_split (dict[str, int]): rows left out, by the split's name; empty under ``on_bad_row: error``.
    """

    def __init__(self, say: Callable[[str], None], group: dist.ProcessGroup) -> None:
        self._say, self._group = say, group
        self.of_split: dict[str, int] = {}

    def gathered(self, bad_rows: BadRows, number: int) -> tuple[int, str | None]:
        """Returns the sum of ``number`` over all ranks, and the first malformed row that any rank has read."""
        if bad_rows.policy == "error":
            return 0, None
        told: list[tuple[int, str | None]] = [(0, None)] * dist.get_world_size()
        dist.all_gather_object(told, (number, bad_rows.first), group=self._group)
        return sum(n for n, _ in told), next((first for _, first in told if first is not None), None)

    def count(self, split: Split, bad_rows: BadRows, number: int, before: int = 0) -> dict[str, int]:
        """Returns ``{"skipped_rows": n}``, n being how many rows of a pass all ranks have left out so far.

        It returns nothing where malformed rows are errors. The first row that is left out is told once a split.

        Args:
            split (Split): that is read.
            bad_rows (BadRows): of this rank.
            number (int): how many of them count by now; a rank reads ahead.
            before (int): of all ranks, before this process went on with the pass.
        """
        if bad_rows.policy == "error":
            return {}
        number, first = self.gathered(bad_rows, number)
        if number and not self.of_split.get(split.name):
            self._say(f"malformed rows of the {split.name} split are left out, the first is {first}")
        self.of_split[split.name] = before + number
        return {"skipped_rows": before + number}


class TrainedRows:
    """Counts the malformed rows of an epoch that were trained, and finds out whether any row was good.

    It counts batches that were trained, since a rank reads ahead. A checkpoint keeps it.

    Args:
        train (Split): of the job.
        skipped (SkippedRows): of the job.
        policy (OnBadRow): of the job.

    Attributes:
        has_good (bool): as far as is known.
    """

    def __init__(self, train: Split, skipped: SkippedRows, policy: OnBadRow) -> None:
        self._train, self._skipped = train, skipped
        self.has_good = policy == "error"
        self._bad_rows = BadRows(policy)
        self._before = 0  # malformed rows of all ranks in this epoch, before a checkpoint from which the job went on
        self._first = 0  # batch of the epoch, from which on this rank has read
        self._malformed: list[int] = []  # rows of each batch since then

    def start(self, batch: int, batches: Batches) -> None:
        """Goes on with ``batches``, which are those of an epoch from ``batch`` on."""
        if batch == 0:
            self._before = 0
        self._first, self._malformed, self._bad_rows = batch, batches.malformed, batches.bad_rows

    def count(self, batch: int) -> dict[str, int]:
        """Counts malformed rows of the epoch before ``batch``; all ranks must call it."""
        return self._skipped.count(self._train, self._bad_rows, self._of_rank(batch), self._before)

    def look_for_good(self, predictions: Predictions, device: torch.device) -> None:
        """Finds out whether any row was good; all ranks must call it."""
        if not self.has_good:
            self.has_good = predictions.gather(device)[0].numel() > 0

    def require_good(self) -> None:
        """Raises DataError if no row was good."""
        require_good_rows(self._train, int(self.has_good), self._bad_rows)

    def state(self, batch: int) -> dict[str, int | bool]:
        """Returns what a checkpoint before ``batch`` keeps; all ranks must call it."""
        number, _ = self._skipped.gathered(self._bad_rows, self._of_rank(batch))
        return {"skipped_rows": self._before + number if batch else 0, "has_good_rows": self.has_good}

    def load(self, about: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned, or from a checkpoint of before it was kept."""
        self._before, self.has_good = about.get("skipped_rows", 0), about.get("has_good_rows", True)

    def _of_rank(self, batch: int) -> int:
        return sum(self._malformed[: max(batch - self._first, 0)])


def require_good_rows(split: Split, good: int, bad_rows: BadRows) -> None:
    """Checks that a pass had a row that counts.

    Args:
        split (Split): that was read.
        good (int): rows of all ranks that counted.
        bad_rows (BadRows): of this rank.

    Raises:
        DataError: there was none.
    """
    if good == 0:
        first = f", the first: {bad_rows.first}" if bad_rows.first else ""
        raise DataError(f"the {split.name} split", f"no row that was read is good{first}")
