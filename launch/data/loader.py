"""Batches of a rank: read, mapped, shuffled and batched in the background."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from launch.data.batch import Batch, BatchMaker
from launch.data.dense import transformed
from launch.data.errors import BadRows
from launch.data.generator import GeneratedRows
from launch.data.id_mapping import IdMapping
from launch.data.meaning import Meaning
from launch.data.prefetch import Prefetched, mapped
from launch.data.rows import Rows, concat
from launch.data.shards import BLOCK, Window, num_batches, rank_range, windows
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
    """

    bad_rows: BadRows
    malformed: list[int]


@dataclass(frozen=True)
class _Pass:
    """One pass over a split."""

    split: Split
    batch_size: int
    shuffle_seed: tuple[int, ...] | None


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
        self._mapping = IdMapping(job.data.ids, job.data.features, job.rows_of_features(), meaning.vocabularies)
        self._batch_size, self._seed = job.train.batch_size, job.train.seed
        self._eval_batch_size = job.train.eval_batch_size or self._batch_size
        self._rank, self._world_size, self._pinned = rank, world_size, pinned

    @property
    def batches_per_epoch(self) -> int:
        """Batches of every rank in a pass over the train split."""
        return num_batches(len(self.splits.train), self._batch_size, self._world_size)

    def train(self, epoch: int, skip: int = 0) -> Batches:
        """Returns the batches of an epoch, in an order that depends on the seed, the epoch and the world size alone.

        Args:
            epoch (int): counted from 0.
            skip (int): how many batches have been trained already: those are left out, at little cost.
        """
        seed = (self._seed, epoch, self._rank) if self._section.shuffle else None
        return self._start(_Pass(self.splits.train, self._batch_size, seed), skip)

    def validation(self) -> Batches:
        """Returns the batches of the validation split, in order."""
        return self._start(_Pass(self.splits.validation, self._eval_batch_size, None), 0)

    def test(self) -> Batches:
        """Returns the batches of the test split, in order."""
        return self._start(_Pass(self.splits.test, self._eval_batch_size, None), 0)

    def known_quality(self) -> dict[str, float]:
        """Returns ``best_possible_auc`` and ``dense_only_auc`` of the test split; nothing, if no generator made it."""
        test = self.splits.test
        generated = test.source.files[0]
        return generated.known_quality(test.start, test.stop) if isinstance(generated, GeneratedRows) else {}

    def _start(self, what: _Pass, skip: int) -> Batches:
        bad_rows = BadRows(self._section.on_bad_row)
        malformed: list[int] = []
        batches = Batches(lambda: self._batches(what, skip, bad_rows, malformed), self._section.prefetch)
        batches.bad_rows, batches.malformed = bad_rows, malformed
        return batches

    def _batches(self, what: _Pass, skip: int, bad_rows: BadRows, malformed: list[int]) -> Iterator[Batch]:
        size = what.batch_size
        batch_of = BatchMaker(self._section.features, self._pinned)

        def make(rows: Rows) -> Batch:
            malformed.append(0 if rows.weights is None else int(np.count_nonzero(rows.weights == 0)))
            return batch_of(rows.padded(size))

        left = num_batches(len(what.split), size, self._world_size) - skip
        rest: Rows | None = None
        for window in self._rows(what, skip * size, bad_rows):
            rows = window if rest is None else concat([rest, window])
            whole = len(rows) // size * size
            for i in range(0, whole, size):
                yield make(rows.cut(i, i + size))
                left -= 1
            rest = rows.cut(whole, len(rows))
        if left > 0:
            if rest is None:
                rest = self._empty(what)
            yield make(rest)
            for _ in range(left - 1):
                yield make(rest.cut(0, 0))

    def _rows(self, what: _Pass, skip: int, bad_rows: BadRows) -> Iterator[Rows]:
        """Yields the rank's rows, but the first ``skip``, window by window, the next one being read meanwhile."""
        source = what.split.source.reopened()
        start, stop = rank_range(what.split.start, what.split.stop, self._rank, self._world_size)
        size = _WINDOW_IN_ORDER if what.shuffle_seed is None else self._section.shuffle_rows
        todo = []
        for window in windows(start, stop, size, what.shuffle_seed, source.random_access):
            drop = min(skip, len(window))
            skip -= drop
            if drop < len(window):
                todo.append((window, drop))

        def read(window_and_drop: tuple[Window, int]) -> Rows:
            return self._read(source, *window_and_drop, bad_rows)

        # Close the source last, when no thread reads it any longer.
        with closing(source), closing(mapped(read, todo, threads=1)) as ahead:
            yield from ahead

    def _read(self, source: RowSource, window: Window, drop: int, bad_rows: BadRows) -> Rows:
        # Read small pieces, because each then stays in the processor's cache on its way.
        pieces = [
            (first, min(first + BLOCK, stop)) for start, stop in window.ranges for first in range(start, stop, BLOCK)
        ]
        rows = concat([self._piece(source, start, stop, bad_rows) for start, stop in pieces])
        if window.order_seed is not None:
            rows = rows.take(np.random.default_rng(window.order_seed).permutation(len(rows))[drop:])
        else:
            rows = rows.cut(drop, len(rows))
        return rows

    def _piece(self, source: RowSource, start: int, stop: int, bad_rows: BadRows) -> Rows:
        raw = source.read(start, stop, bad_rows)
        rows = self._mapping(
            raw, bad_rows, lambda i: source.location(start + i), lambda i, f: source.quoted(start + i, f)
        )
        dense = transformed(rows.dense, self._section.dense_transform, self._section.missing_flags)
        return replace(rows, dense=dense)

    def _empty(self, what: _Pass) -> Rows:
        """Returns no rows, in the form of the split's, for a rank that has none at all."""
        first = what.split.start
        window = Window(((first, first + 1),), None)
        with closing(what.split.source.reopened()) as source:
            return self._read(source, window, 0, BadRows("skip")).cut(0, 0)


def open_data(
    job: "Job",
    rank: int,
    world_size: int,
    settle: Callable[[Callable[[], Meaning]], Meaning] = lambda build: build(),
    pinned: bool = False,
) -> Data:
    """Opens the data of a job for one rank.

    Args:
        job (Job): the config.
        rank (int): of this process.
        world_size (int): W.
        settle (Callable[[Callable[[], Meaning]], Meaning]): returns the meaning of the run's rows; it gets what
            makes that of new rows. Default: that.
        pinned (bool): see `Data`.

    Raises:
        DataError: a file is missing, unreadable, empty or malformed, with file and line.
    """
    splits = open_splits(job.data, job.rows_of_features())
    return Data(job, splits, settle(lambda: Meaning.of_job(job, splits.train)), rank, world_size, pinned)
