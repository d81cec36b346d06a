"""Batches of a rank: read, mapped, shuffled and batched in the background."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from launch.data.batch import Batch, BatchMaker
from launch.data.deals import Deal, batches_left, part_left
from launch.data.dense import transformed
from launch.data.errors import BadRows
from launch.data.generator import GeneratedRows
from launch.data.id_mapping import IdMapping
from launch.data.meaning import Meaning
from launch.data.prefetch import Prefetched, mapped
from launch.data.row_sums import RowSums
from launch.data.rows import Array, Rows, concat
from launch.data.shards import BLOCK, Window, rank_range, windows
from launch.data.source import RowSource
from launch.data.split import Split, Splits, open_splits

if TYPE_CHECKING:
    from launch.config import Job

_WINDOW_IN_ORDER = 16_384  # rows that are read at once if nothing is shuffled


class Batches(Prefetched[Batch]):
    """Batches of one pass over a split, made in the background.

    Attributes:
        wait_seconds (float): how long the consumer has waited for batches so far.
        bad_rows (BadRows): malformed rows that this rank has read so far, if they are skipped.
        malformed (list[int]): how many of them are in each batch that has been made so far.
        sums (list[RowSums]): those of the rows in each batch that has been made so far.
    """

    bad_rows: BadRows
    malformed: list[int]
    sums: list[RowSums]


@dataclass(frozen=True)
class _Pass:
    """One pass over a split."""

    split: Split
    deals: Sequence[Deal]
    shuffle_seed: tuple[int, ...] | None  # with the rank of the first deal it gives that one's order


class Data:
    """The data of one rank.

    All ranks have equally many batches in every pass, all of one size, so that none waits for another in vain. Each row
    of a split is in exactly one batch of one rank, with weight 1. Rows of weight 0 fill the last batch, and stand for
    malformed rows that are skipped. A loss or a metric must leave them out.

    Args:
        job (Job): the config.
        splits (Splits): train, validation and test.
        meaning (Meaning): of the rows of tables.
        rank (int): of this process.
        world_size (int): W.
        pinned (bool): whether batches are in pinned memory, as a GPU's should be.
    """

    def __init__(
        self,
        job: "Job",
        splits: Splits,
        meaning: Meaning,
        rank: int = 0,
        world_size: int = 1,
        pinned: bool = False,
    ) -> None:
        self._section, self.splits, self.meaning = job.data, splits, meaning
        raw = set(job.data.features) - set(job.mapped_features())
        self._mapping = IdMapping(job.data.ids, job.data.features, job.rows_of_features(), meaning.vocabularies, raw)
        self._batch_size, self._seed = job.train.batch_size, job.train.seed
        self._eval_batch_size = job.train.eval_batch_size or self._batch_size
        self._rank, self._world_size, self._pinned = rank, world_size, pinned

    @property
    def batches_per_epoch(self) -> int:
        """Batches of every rank in a pass over the train split."""
        return self.batches_left([Deal(self._world_size, self._batch_size)])

    def batches_left(self, deals: Sequence[Deal]) -> int:
        """Returns how many batches every rank has still to train in the last deal of an epoch."""
        return batches_left(len(self.splits.train), deals)

    def train(self, epoch: int, deals: Sequence[Deal] = ()) -> Batches:
        """Returns the batches that are left of an epoch.

        Their order depends on the seed, the epoch and the deals alone. What has been trained is left out, at little
        cost.

        Args:
            epoch (int): counted from 0.
            deals (Sequence[Deal]): of the epoch, the last of which is to this number of ranks; default: none before.
        """
        seed = (self._seed, epoch) if self._section.shuffle else None
        return self._start(_Pass(self.splits.train, deals or [Deal(self._world_size, self._batch_size)], seed))

    def validation(self) -> Batches:
        """Returns the batches of the validation split, in order."""
        return self._start(_Pass(self.splits.validation, [Deal(self._world_size, self._eval_batch_size)], None))

    def test(self) -> Batches:
        """Returns the batches of the test split, in order."""
        return self._start(_Pass(self.splits.test, [Deal(self._world_size, self._eval_batch_size)], None))

    def order(self) -> dict[str, int | bool]:
        """Returns what the order of the train split's rows depends on, beside their files."""
        section = self._section
        return {
            "rows": len(self.splits.train),
            "train.seed": self._seed,
            "data.shuffle": section.shuffle,
            "data.shuffle_rows": section.shuffle_rows,
        }

    def known_quality(self) -> dict[str, float]:
        """Returns ``best_possible_auc`` and ``dense_only_auc`` of the test split; nothing, if no generator made it."""
        test = self.splits.test
        generated = test.source.files[0]
        return generated.known_quality(test.start, test.stop) if isinstance(generated, GeneratedRows) else {}

    def _start(self, what: _Pass) -> Batches:
        bad_rows = BadRows(self._section.on_bad_row)
        malformed: list[int] = []
        sums: list[RowSums] = []
        batches = Batches(lambda: self._batches(what, bad_rows, malformed, sums), self._section.prefetch)
        batches.bad_rows, batches.malformed, batches.sums = bad_rows, malformed, sums
        return batches

    def _batches(self, what: _Pass, bad_rows: BadRows, malformed: list[int], sums: list[RowSums]) -> Iterator[Batch]:
        size = what.deals[-1].batch_size
        batch_of = BatchMaker(self._section.features, self._pinned)

        def make(rows: Rows, numbers: Array) -> Batch:
            malformed.append(0 if rows.weights is None else int(np.count_nonzero(rows.weights == 0)))
            sums.append(RowSums.of(numbers))
            return batch_of(rows.padded(size))

        left = batches_left(len(what.split), what.deals)
        rest: tuple[Rows, Array] | None = None
        for rows, numbers in self._rows(what, bad_rows):
            if rest is not None:
                rows, numbers = concat([rest[0], rows]), np.concatenate([rest[1], numbers])
            whole = len(rows) // size * size
            for i in range(0, whole, size):
                yield make(rows.cut(i, i + size), numbers[i : i + size])
                left -= 1
            rest = rows.cut(whole, len(rows)), numbers[whole:]
        if left > 0:
            if rest is None:
                rest = self._empty(what)
            yield make(*rest)
            for _ in range(left - 1):
                yield make(rest[0].cut(0, 0), rest[1][:0])

    def _rows(self, what: _Pass, bad_rows: BadRows) -> Iterator[tuple[Rows, Array]]:
        """Yields the rank's rows and their numbers, window by window, the next one being read meanwhile."""
        source = what.split.source.reopened()
        todo = list(self._windows(what, source.random_access))

        def read(part: tuple[Window, int, int]) -> tuple[Rows, Array]:
            return self._read(source, *part, bad_rows)

        # Close the source last, when no thread reads it any longer.
        with closing(source), closing(mapped(read, todo, threads=1)) as ahead:
            yield from ahead

    def _windows(self, what: _Pass, random_access: bool) -> Iterator[tuple[Window, int, int]]:
        """Yields windows with the rank's rows, each with [start, stop) of those in the window's order."""
        size = _WINDOW_IN_ORDER if what.shuffle_seed is None else self._section.shuffle_rows
        split, ranks = what.split, what.deals[0].world_size
        for stretch in part_left(len(split), what.deals, self._rank):
            seed = None if what.shuffle_seed is None else (*what.shuffle_seed, stretch.rank)
            first = 0
            for window in windows(*rank_range(split.start, split.stop, stretch.rank, ranks), size, seed, random_access):
                start, stop = max(stretch.start - first, 0), min(stretch.stop - first, len(window))
                if start < stop:
                    yield window, start, stop
                first += len(window)

    def _read(self, source: RowSource, window: Window, start: int, stop: int, bad_rows: BadRows) -> tuple[Rows, Array]:
        """Returns rows [start, stop) of a window's order, and their numbers."""
        # Read small pieces, because each then stays in the processor's cache on its way.
        pieces = [
            (first, min(first + BLOCK, last)) for begin, last in window.ranges for first in range(begin, last, BLOCK)
        ]
        rows = concat([self._piece(source, *piece, bad_rows) for piece in pieces])
        numbers = np.concatenate([np.arange(*piece) for piece in pieces])
        if window.order_seed is None:
            return rows.cut(start, stop), numbers[start:stop]
        order = np.random.default_rng(window.order_seed).permutation(len(rows))[start:stop]
        return rows.take(order), numbers[order]

    def _piece(self, source: RowSource, start: int, stop: int, bad_rows: BadRows) -> Rows:
        raw = source.read(start, stop, bad_rows)
        rows = self._mapping(
            raw, bad_rows, lambda i: source.location(start + i), lambda i, f: source.quoted(start + i, f)
        )
        dense = transformed(rows.dense, self._section.dense_transform, self._section.missing_flags)
        return replace(rows, dense=dense)

    def _empty(self, what: _Pass) -> tuple[Rows, Array]:
        """Returns no rows, in the form of the split's, for a rank that has none at all."""
        first = what.split.start
        window = Window(((first, first + 1),), None)
        with closing(what.split.source.reopened()) as source:
            rows, numbers = self._read(source, window, 0, 1, BadRows("skip"))
        return rows.cut(0, 0), numbers[:0]


def open_data(job: "Job", rank: int, world_size: int, pinned: bool = False) -> Data:
    """Opens the data of a job for one rank, with a meaning that the rank makes by itself.

    Args:
        job (Job): the config.
        rank (int): of this process.
        world_size (int): W.
        pinned (bool): see `Data`.

    Raises:
        DataError: a file is missing, unreadable, empty or malformed, with file and line.
    """
    splits = open_splits(job.data, job.rows_of_features())
    return Data(job, splits, Meaning.of_job(job, splits.train), rank, world_size, pinned)
