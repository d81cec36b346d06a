"""Malformed rows that a pass over a split leaves out: counted over all ranks, reported, and kept in checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from launch.data.errors import BadRows, OnBadRow
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

    def count(self, split: Split, bad_rows: BadRows, number: int, before: int = 0) -> dict[str, int]:
        """Returns ``{"skipped_rows": n}``, n being how many rows of a pass all ranks have left out so far.

        It returns nothing if malformed rows are errors. The first row that is left out is printed once a split.

        Args:
            split (Split): that is read.
            bad_rows (BadRows): of this rank.
            number (int): how many of them count by now; a rank reads ahead.
            before (int): of all ranks, before this process went on with the pass.
        """
        if bad_rows.policy == "error":
            return {}
        of_ranks: list[tuple[int, str | None]] = [(0, None)] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (number, bad_rows.first), group=self._group)
        number = sum(n for n, _ in of_ranks)
        if number and not self.of_split.get(split.name):
            first = next((first for _, first in of_ranks if first is not None), None)
            self._say(f"malformed rows of the {split.name} split are left out, the first is {first}")
        self.of_split[split.name] = before + number
        return {"skipped_rows": before + number}


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

    def look_for_good(self, predictions: Predictions, device: torch.device, hosts: dist.ProcessGroup) -> None:
        """Finds out whether any row was good; all ranks must call it."""
        if not self.has_good:
            _, _, weights = predictions.gather(device, hosts)
            self.has_good = bool((weights > 0).any())

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
