"""How the rows of an epoch are dealt to ranks, and what is left of them is dealt anew to another number of ranks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launch.data.shards import num_batches, rank_range


@dataclass(frozen=True)
class Deal:
    """The rows that were left of an epoch, dealt to the ranks of a job in equal parts.

    Args:
        world_size (int): ranks of the job.
        batch_size (int): rows of a batch of one rank.
        batches (int): how many batches each rank has trained of its part.
    """

    world_size: int
    batch_size: int
    batches: int = 0

    @property
    def rows(self) -> int:
        """How many rows a rank has trained, if its part has as many."""
        return self.batches * self.batch_size

    def __str__(self) -> str:
        return f"{self.world_size} ranks in {self.batches:,} batches of {self.batch_size:,}"


@dataclass(frozen=True)
class Stretch:
    """Rows [start, stop) of those of one rank of the epoch's first deal, in the order in which that rank reads them.

    The order depends on the epoch, the seed and that rank alone. So all later ranks find the same rows there.
    """

    rank: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def part_left(num_rows: int, deals: Sequence[Deal], rank: int) -> list[Stretch]:
    """Returns what is left of a rank's part in the last deal of an epoch.

    Args:
        num_rows (int): of the split.
        deals (Sequence[Deal]): of the epoch, the first of which deals all rows.
        rank (int): of the last deal.

    Example:
        >>> part_left(12, [Deal(2, 4, batches=1)], 1)  # rank 0 has rows 0 to 5, and rank 1 has 6 to 11
        [Stretch(rank=1, start=4, stop=6)]
        >>> [part_left(12, [Deal(3, 2, batches=1), Deal(2, 2)], rank) for rank in range(2)]
        [[Stretch(rank=0, start=2, stop=4), Stretch(rank=1, start=2, stop=3)],
         [Stretch(rank=1, start=3, stop=4), Stretch(rank=2, start=2, stop=4)]]
    """
    return _without(_parts(num_rows, deals)[rank], deals[-1].rows)


def batches_left(num_rows: int, deals: Sequence[Deal]) -> int:
    """Returns the number of batches that every rank has still to train in the last deal of an epoch.

    Example:
        >>> batches_left(12, [Deal(3, 2, batches=1)]), batches_left(12, [Deal(3, 2, batches=1), Deal(2, 2)])
        (1, 2)
    """
    dealt = sum(len(stretch) for part in _parts(num_rows, deals) for stretch in part)
    return num_batches(dealt, deals[-1].batch_size, deals[-1].world_size) - deals[-1].batches


def continued(deals: Sequence[Deal], world_size: int, batch_size: int) -> list[Deal]:
    """Returns the deals of an epoch that a job of ``world_size`` ranks goes on with.

    Example:
        >>> continued([Deal(2, 4, batches=1)], 2, 4)
        [Deal(world_size=2, batch_size=4, batches=1)]
        >>> continued([Deal(2, 4, batches=1)], 3, 4)
        [Deal(world_size=2, batch_size=4, batches=1), Deal(world_size=3, batch_size=4, batches=0)]
        >>> continued([Deal(2, 4, batches=0)], 3, 4)
        [Deal(world_size=3, batch_size=4, batches=0)]
    """
    if deals and (deals[-1].world_size, deals[-1].batch_size) == (world_size, batch_size):
        return list(deals)
    return [*(deal for deal in deals if deal.batches), Deal(world_size, batch_size)]


def _parts(num_rows: int, deals: Sequence[Deal]) -> list[list[Stretch]]:
    """Returns the part of each rank in the last deal, with what has been trained of it."""
    first = deals[0].world_size
    ends = (rank_range(0, num_rows, rank, first) for rank in range(first))
    parts = [[Stretch(rank, 0, stop - start)] for rank, (start, stop) in enumerate(ends)]
    for deal, following in pairwise(deals):
        left = [stretch for part in parts for stretch in _without(part, deal.rows)]
        parts = list(_dealt(left, following.world_size))
    return parts


def _dealt(rows: Sequence[Stretch], world_size: int) -> Iterator[list[Stretch]]:
    num_rows = sum(len(stretch) for stretch in rows)
    for rank in range(world_size):
        yield _cut(rows, *rank_range(0, num_rows, rank, world_size))


def _without(part: Sequence[Stretch], trained: int) -> list[Stretch]:
    return _cut(part, trained, sum(len(stretch) for stretch in part))


def _cut(rows: Iterable[Stretch], start: int, stop: int) -> list[Stretch]:
    """Returns rows [start, stop) of stretches that follow one another."""
    found, first = [], 0
    for stretch in rows:
        low, high = max(start - first, 0), min(stop - first, len(stretch))
        if low < high:
            found.append(Stretch(stretch.rank, stretch.start + low, stretch.start + high))
        first += len(stretch)
    return found
