"""Which rows a rank reads, in which order: contiguous parts of a split, shuffled in windows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Rows that are read together; the generator makes as many from one random stream.
BLOCK = 4096


@dataclass(frozen=True)
class Window:
    """Rows that are read and shuffled at once.

    Args:
        ranges (tuple[tuple[int, int], ...]): [start, stop) of rows, read one after the other.
        order_seed (tuple[int, ...] | None): of their permutation; None: in order.
    """

    ranges: tuple[tuple[int, int], ...]
    order_seed: tuple[int, ...] | None

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def rank_range(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns a rank's part of rows [start, stop): contiguous, so that a rank reads its own files or parts of files.

    Example:
        >>> [rank_range(100, 107, rank, 3) for rank in range(3)]
        [(100, 102), (102, 104), (104, 107)]
    """
    n = stop - start
    return start + n * rank // world_size, start + n * (rank + 1) // world_size


def num_batches(num_rows: int, batch_size: int, world_size: int) -> int:
    """Returns the number of batches of every rank: that of the rank with most rows.

    Example:
        >>> num_batches(7, batch_size=2, world_size=3)
        2
    """
    most = math.ceil(num_rows / world_size)
    return math.ceil(most / batch_size)


def windows(
    start: int, stop: int, window_rows: int, shuffle_seed: tuple[int, ...] | None, random_access: bool
) -> Iterator[Window]:
    """Yields windows that hold each of rows [start, stop) once.

    Args:
        start (int): first row.
        stop (int): row after the last.
        window_rows (int): of all windows but the last.
        shuffle_seed (tuple[int, ...] | None): None: rows stay in order.
        random_access (bool): a shuffled window is made of blocks from all over the range.
    """
    if shuffle_seed is None or not random_access:
        for i, first in enumerate(range(start, stop, window_rows)):
            seed = None if shuffle_seed is None else (*shuffle_seed, i)
            yield Window(((first, min(first + window_rows, stop)),), seed)
        return
    # Cut where the generator's blocks begin, so that none is made twice.
    cuts = [start, *range((start // BLOCK + 1) * BLOCK, stop, BLOCK), stop]
    blocks = [(a, b) for a, b in pairwise(cuts) if a < b]
    order = np.random.default_rng([*shuffle_seed, 0]).permutation(len(blocks)).tolist()
    each = max(window_rows // BLOCK, 1)
    for i in range(0, len(order), each):
        yield Window(tuple(blocks[j] for j in order[i : i + each]), (*shuffle_seed, 1, i))
