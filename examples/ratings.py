"""The data of sequence.py: ratings of MovieLens, or generated ones in the same form, as sequences of items."""

import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def generated_ratings(users: int = 2000, length: int = 24) -> npt.NDArray[np.float64]:
    """Returns rows of userId, movieId, rating and timestamp.

    Users stay in one of 40 groups of 50 items for some time, and prefer some items of a group to others.
    """
    random, steps = np.random.default_rng(0), np.arange(length)
    groups = random.permutation(2000).reshape(40, 50)
    changes = np.where(random.random((users, length)) < 0.1, steps, 0)
    since = np.maximum.accumulate(changes, axis=1)
    group = np.take_along_axis(random.integers(40, size=(users, length)), since, axis=1)
    weights = 1 / np.arange(1, 51)
    items = groups[group, random.choice(50, size=(users, length), p=weights / weights.sum())]
    user = np.repeat(np.arange(users), length)
    return np.stack([user, items.ravel(), np.full(len(user), 5), np.tile(steps, users)], axis=1).astype(np.float64)


def sequences_of(path: str | None, least: int) -> tuple[list[npt.NDArray[np.int64]], int]:
    """Returns the items of each user with at least so many ratings, in the order of time, and the number of items.

    Args:
        path (str | None): MovieLens' ``ratings.csv``. None is for generated ratings.
        least (int): the fewest ratings of a user.
    """
    table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2) if path else generated_ratings()
    table = table[np.lexsort((table[:, 3], table[:, 0]))]
    # Number items by their frequency, because the strided grouping then keeps frequent items apart.
    _, of_row, counts = np.unique(table[:, 1], return_inverse=True, return_counts=True)
    ids = np.argsort(np.argsort(-counts, kind="stable"))[of_row]
    users = np.split(ids, np.flatnonzero(np.diff(table[:, 0])) + 1)
    sequences = [own for own in users if len(own) >= least]
    if not sequences:
        raise SystemExit(f"{path}: no user has {least} ratings")
    return sequences, len(counts)


def windows(past: int) -> tuple[Tensor, Tensor, int]:
    """Returns rows of ``past`` items and the next one, to train and to test by, and the number of items.

    The last item of each user is for the test. The ratings are those of the file that the command names, if it does.
    """
    sequences, num_items = sequences_of(sys.argv[1] if len(sys.argv) > 1 else None, least=past + 2)
    train = np.concatenate([np.lib.stride_tricks.sliding_window_view(own[:-1], past + 1) for own in sequences])
    test = np.stack([own[-past - 1 :] for own in sequences])
    return torch.from_numpy(train), torch.from_numpy(test), num_items


def batches(
    rows: Tensor, num_items: int, batch_size: int, negatives: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields past items (B, past), and candidates (B, 1 + negatives), of which the first is the next item."""
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (batch_size,))]
        yield batch[:, :-1], torch.cat([batch[:, -1:], torch.randint(num_items, (batch_size, negatives))], dim=1)


def recall_and_ndcg(best: Tensor, following: Tensor) -> str:
    """Returns both measures of the best items (B, K), or (K,) for all users, against the next items (B, 1)."""
    hits = (best == following).float()
    ndcg = (hits / torch.arange(2, hits.shape[1] + 2).log2()).sum(dim=1).mean()
    return f"recall@{hits.shape[1]} {hits.sum(dim=1).mean():.3f}, NDCG@{hits.shape[1]} {ndcg:.3f}"
