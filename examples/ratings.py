"""Ratings as sequences of items: those of MovieLens, or generated ones in the same form."""

import numpy as np
import numpy.typing as npt


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
