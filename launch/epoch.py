"""The position of a job in its data: the epoch, the batches trained of it, and how its rows were dealt to ranks."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from launch.data.deals import Deal, continued
from launch.data.loader import Batches, Data
from launch.data.row_sums import RowSums
from launch.differences import differences


class EpochError(RuntimeError):
    """An epoch has not trained each of its rows once."""


class Epoch:
    """The epoch that a job trains. All ranks must make the same calls.

    A job that goes on with another number of ranks, or another batch size, deals the rows that are left to its ranks
    anew. Sums over the numbers of rows go along in checkpoints, and show at the end that each row was trained once.

    Args:
        data (Data): of this rank.
        batch_size (int): rows of a batch of one rank.
        group (ProcessGroup): of all ranks, on the hosts.

    Attributes:
        number (int): of the epoch, counted from 0.
        batch (int): how many batches of it each rank has trained.
        changed (list[str]): what the order of rows depends on and a checkpoint had otherwise. Then some rows of the
            epoch may be trained twice, and others not at all.
    """

    def __init__(self, data: Data, batch_size: int, group: dist.ProcessGroup) -> None:
        self._data, self._batch_size, self._group = data, batch_size, group
        self.number = self.batch = 0
        self.changed: list[str] = []
        self._before: list[Deal] = []  # of this epoch, before the present one
        self._trained = RowSums()  # of all ranks, before this process went on with the epoch
        self._first = 0  # the batch from which on this rank has read
        self._sums: list[RowSums] = []  # of each batch since then
        self._ended: dict[str, Any] | None = None  # the latest epoch that has come to its end

    @property
    def deals(self) -> list[Deal]:
        """How the rows of the epoch have been dealt so far."""
        before = sum(deal.batches for deal in self._before)
        return [*self._before, Deal(dist.get_world_size(), self._batch_size, self.batch - before)]

    @property
    def batches_left(self) -> int:
        """How many batches of the epoch each rank has still to train."""
        return self._data.batches_left(self.deals)

    def start(self) -> Batches:
        """Returns the batches that are left."""
        batches = self._data.train(self.number, self.deals)
        self._first, self._sums = self.batch, batches.sums
        return batches

    def end(self) -> str:
        """Goes on to the next epoch; returns a sentence on this one if its rows were dealt anew, else nothing.

        Raises:
            EpochError: some rows were not trained, or twice, though their order has been the same all along.
        """
        split, trained, deals = self._data.splits.train, self._trained_rows(), self.deals
        each_once = trained == RowSums.of_range(split.start, split.stop)
        text = f"{trained.rows:,} rows were trained by {', then '.join(map(str, deals))}"
        if not each_once and not self.changed:
            raise EpochError(f"epoch {self.number}: {text}; allowed: each of the split's {len(split):,} rows once")
        self._ended = {"epoch": self.number, "deals": list(map(asdict, deals)), "each_row_once": each_once}
        sentence = f"epoch {self.number}: {text}{', each row once' if each_once else ''}" if len(deals) > 1 else ""
        self.number, self.batch = self.number + 1, 0
        self._before, self._trained, self._sums, self._first, self.changed = [], RowSums(), [], 0, []
        return sentence

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {
            "epoch": self.number,
            "deals": [asdict(deal) for deal in self.deals],
            "trained": asdict(self._trained_rows()),
            "order": self._data.order(),
            "changed": self.changed,
            "ended": self._ended,
        }

    def load(self, about: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.number, self._trained, self._ended = about["epoch"], RowSums(**about["trained"]), about["ended"]
        deals = continued([Deal(**d) for d in about["deals"]], dist.get_world_size(), self._batch_size)
        self._before = deals[:-1]
        self.batch = self._first = sum(deal.batches for deal in deals)
        if self.batch:
            self.changed = [*about["changed"], *differences(about["order"], self._data.order())]

    def _trained_rows(self) -> RowSums:
        """Returns the sums of the rows that all ranks have trained of the epoch so far."""
        own = RowSums.sum(self._sums[: self.batch - self._first])
        sums = torch.tensor([own.rows, own.numbers, own.squares])
        dist.all_reduce(sums, group=self._group)
        return RowSums.sum([self._trained, RowSums(*sums.tolist())])
