"""Rows day by day whose ids are raw 64-bit numbers: generated ones that drift, and the Criteo sample's hashes."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.auc import auc
from launch.data.criteo_tsv import tsv_source
from launch.data.dense import transformed
from launch.data.errors import BadRows
from launch.data.rows import MISSING, Array

CRITEO = "criteo_kaggle_137k.tsv.gz"
_CRITEO_DAYS = 7
_CLOSED_UP_TO = 2_000  # values of a Criteo feature that has a vocabulary under every method


@dataclass(frozen=True)
class Day:
    """The rows of a day.

    Args:
        dense: (N, dense features) float32, as the model takes it.
        closed: (N, C) ids in [0, S) of features with a plain table each.
        raw: (N, F, H) int64, any numbers: H ids of each of F features, all of one table.
        labels: (N,) float32.
    """

    dense: Tensor
    closed: Tensor
    raw: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Days:
    """A data set.

    Args:
        days: in the order of time.
        closed_rows: S of each closed feature.
        about: facts of the rows, for the results.
    """

    days: list[Day]
    closed_rows: list[int]
    about: dict[str, float]


def drifting_days(
    num_days: int = 6, rows: int = 60_000, live: int = 80_000, renewed: float = 0.1, seed: int = 0
) -> Days:
    """Generates days on each of which a share of the live ids is new.

    ``live`` slots have an id each and a popularity by a power law. Every day a tenth of the slots, drawn at random, get
    a new id, which is never seen again once it is replaced. An id is a random number of 64 bits, and adds an effect
    N(0, 1) of its own to the logit. A row has three of them, two closed features, and four dense numbers.

    Args:
        num_days: number of days.
        rows: of a day.
        live: ids that are live at once.
        renewed: share of the slots whose id is new, every day but the first.
        seed: of all of it.
    """
    random = np.random.default_rng(seed)
    closed_rows, ids_per_row, num_dense = [1_000, 100], 3, 4
    closed_effects = [0.3 * random.standard_normal(s) for s in closed_rows]
    direction = 0.3 * random.standard_normal(num_dense)
    generation = np.zeros(live, np.int64)
    days, ever, occurrences_of_new, logits, labels = [], live, [], [], []
    for number in range(num_days):
        if number:
            new = random.permutation(live)[: round(renewed * live)]
            generation[new] += 1
            ever += len(new)
        raw_of_slot = mixed(np.arange(live) * 1_000 + generation + (seed + 1) * 2**40)
        popular = random.random((rows, ids_per_row))
        slot = np.minimum(((1 + popular * ((live + 1) ** -0.1 - 1)) ** -10).astype(np.int64) - 1, live - 1)
        raw = raw_of_slot[slot]
        closed = np.stack([random.integers(0, s, rows) for s in closed_rows], axis=1)
        dense = random.standard_normal((rows, num_dense)).astype(np.float32)
        logit = -1.0 + dense @ direction + 1.5 * effects(raw).sum(1) / np.sqrt(ids_per_row)
        logit += sum(effect[closed[:, c]] for c, effect in enumerate(closed_effects))
        label = (random.random(rows) * (1 + np.exp(-logit)) < 1).astype(np.float32)
        if number:
            occurrences_of_new.append(np.isin(slot, new).mean())
        logits.append(logit)
        labels.append(label)
        days.append(_day(dense, closed, raw[:, None, :], label))
    about = {
        "rows_of_a_day": rows,
        "live_ids": live,
        "ids_of_all_days": ever,
        "share_of_lookups_with_ids_of_the_day": round(float(np.mean(occurrences_of_new)), 4),
        "best_possible_auc": round(auc(np.concatenate(labels[1:]), np.concatenate(logits[1:])), 4),
    }
    return Days(days, closed_rows, about)


def criteo_days(folder: Path) -> Days:
    """Returns the Criteo sample, a seventh of its rows a day, in the order of time.

    Features of up to 2,000 values are closed. The hashes of all others, 32 bits each, are raw ids of one table, whose
    higher bits have the number of the feature. A missing value is an id like others.

    Raises:
        FileNotFoundError: the sample is not in ``folder``.
    """
    file = folder / CRITEO
    if not file.exists():
        raise FileNotFoundError(file)
    source = tsv_source([file])
    rows = source.read(0, source.num_rows, BadRows("error"))
    dense = transformed(rows.dense, "log1p", missing_flags=False)
    closed, closed_rows, raw = [], [], []
    for f in range(rows.ids.shape[1]):
        values = rows.ids[:, f]
        distinct, place = np.unique(values, return_inverse=True)
        if len(distinct) <= _CLOSED_UP_TO:
            closed.append(place)
            closed_rows.append(len(distinct))
        else:
            raw.append(np.where(values == MISSING, 2**32, values) + f * 2**33)
    ids = np.stack(raw, axis=1)
    ends = np.linspace(0, len(ids), _CRITEO_DAYS + 1).astype(int)
    days = [
        _day(dense[a:b], np.stack(closed, axis=1)[a:b], ids[a:b, :, None], rows.labels[a:b]) for a, b in pairwise(ends)
    ]
    seen = [np.unique(ids[:end]) for end in ends[1:]]
    new = [1 - np.isin(ids[a:b], known).mean() for a, b, known in zip(ends[1:-1], ends[2:], seen[:-1], strict=True)]
    about = {
        "rows_of_a_day": len(ids) // _CRITEO_DAYS,
        "features": ids.shape[1],
        "ids_of_all_days": len(seen[-1]),
        "share_of_lookups_with_ids_of_the_day": round(float(np.mean(new)), 4),
    }
    return Days(days, closed_rows, about)


def mixed(numbers: Array) -> Array:
    """Returns numbers that look random, a different one for each: the finaliser of SplitMix64."""
    z = numbers.astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


def effects(raw: Array) -> Array:
    """Returns what each id adds to the logit: N(0, 1), the same wherever the id occurs."""
    bits = mixed(raw.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)).view(np.uint64)
    low, high = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64), (bits >> np.uint64(32)).astype(np.float64)
    return np.sqrt(-2 * np.log((low + 0.5) * 2.0**-32)) * np.cos(high * (2 * np.pi * 2.0**-32))


def _day(dense: Array, closed: Array, raw: Array, labels: Array) -> Day:
    arrays = (dense.astype(np.float32), closed.astype(np.int64), raw.astype(np.int64), labels.astype(np.float32))
    return Day(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
