"""Category ids as the tables' rows: by modulo, by a vocabulary in the order of frequency, or as they are."""

import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from launch.data.errors import BadRows, DataError, readable
from launch.data.rows import MISSING, Array, Rows
from launch.data.source import RowSource

UNKNOWN = 0
_COUNTS = "counts of "
Location = Callable[[int], str]
Quoted = Callable[[int, int], str]


class Vocabulary:
    """Ids 1, 2, … for the values of one feature, the most frequent first; 0 for all others.

    A table of S rows holds the S - 1 most frequent values; the rest share row 0. Ties go to the lesser value, so that
    every rank builds the same one. A missing value is a value like others.

    Args:
        values (Array): distinct, in the order of their ids.
        counts (Array | None): how often each occurred; None: it was not counted.

    Example:
        >>> v = Vocabulary.of_counts(np.array([7, 8, 9]), np.array([1, 5, 5]), min_count=2)
        >>> v.values.tolist(), v.ids(np.array([9, 7, 8])).tolist(), v.ids(np.array([9, 7, 8]), num_rows=2).tolist()
        ([8, 9], [2, 0, 1], [0, 0, 1])
    """

    def __init__(self, values: Array, counts: Array | None = None) -> None:
        self.values = values.astype(np.int64)
        self.counts = None if counts is None else counts.astype(np.int64)
        self._order = np.argsort(self.values, kind="stable")
        self._sorted = self.values[self._order]
        self._ids = (self._order + 1).astype(np.int64)

    @classmethod
    def of_counts(cls, values: Array, counts: Array, min_count: int = 1) -> "Vocabulary":
        """Returns the vocabulary of distinct ``values`` that occur ``counts`` times, at least ``min_count`` times."""
        frequent = counts >= min_count
        values, counts = values[frequent], counts[frequent]
        order = np.lexsort((values, -counts))
        return cls(values[order], counts[order])

    def __len__(self) -> int:
        return len(self.values)

    def ids(self, values: Array, num_rows: int | None = None) -> Array:
        """Returns the id of each of ``values``, for a table of ``num_rows``."""
        if len(self.values) == 0:
            return np.full(values.shape, UNKNOWN, np.int64)
        place = np.minimum(np.searchsorted(self._sorted, values), len(self._sorted) - 1)
        ids = np.where(self._sorted[place] == values, self._ids[place], UNKNOWN)
        return ids if num_rows is None else np.where(ids < num_rows, ids, UNKNOWN)


class ValueCounts:
    """Counts of each value of some features, gathered part by part.

    Args:
        features (Sequence[int]): positions in the rows of those that are counted.
    """

    def __init__(self, features: Sequence[int]) -> None:
        self._features = features
        self._counts = [(np.empty(0, np.int64), np.empty(0, np.int64)) for _ in features]
        self._pending: list[list[Array]] = [[] for _ in features]
        self._num_pending = 0

    def add(self, rows: Rows) -> None:
        """Counts the ids of ``rows`` of weight 1."""
        if rows.weights is not None:
            rows = rows.take(np.flatnonzero(rows.weights))
        of_all = columns(rows)
        for pending, feature in zip(self._pending, self._features, strict=True):
            pending.append(of_all[feature].reshape(-1))
        self._num_pending += len(rows)
        if self._num_pending >= 1 << 20:  # merging costs as much as what is there already
            self._merge()

    def cardinalities(self) -> list[int]:
        """Returns the number of distinct values of each counted feature, a missing one being a value."""
        self._merge()
        return [len(values) for values, _ in self._counts]

    def vocabularies(self, min_count: int = 1, tables: Sequence[str] | None = None) -> list[Vocabulary]:
        """Returns the vocabulary of each counted feature.

        Args:
            min_count (int): least number of occurrences of a value.
            tables (Sequence[str] | None): the table of each feature; features of one table share a vocabulary, because
                a value must have one row there. Default: each has its own.
        """
        self._merge()
        of_table: dict[str, list[tuple[Array, Array]]] = {}
        names = [str(feature) for feature in self._features] if tables is None else tables
        for name, counts in zip(names, self._counts, strict=True):
            of_table.setdefault(name, []).append(counts)
        vocabularies = {name: Vocabulary.of_counts(*_summed(parts), min_count) for name, parts in of_table.items()}
        return [vocabularies[name] for name in names]

    def _merge(self) -> None:
        for f, pending in enumerate(self._pending):
            if pending:
                new = np.unique(np.concatenate(pending), return_counts=True)
                self._counts[f] = _summed([self._counts[f], new])
                pending.clear()
        self._num_pending = 0


def _summed(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Returns the distinct values of all ``parts``, in order, and the sums of their counts."""
    values, place = np.unique(np.concatenate([values for values, _ in parts]), return_inverse=True)
    counts = np.bincount(place, weights=np.concatenate([counts for _, counts in parts]))
    return values.astype(np.int64), counts.astype(np.int64)


def columns(rows: Rows) -> list[Array]:
    """Returns the ids of each feature, (B, H_f) or (N_f,)."""
    if rows.lengths is None:
        ends = np.cumsum(rows.ids_per_row)
        return [rows.ids[:, end - count : end] for end, count in zip(ends, rows.ids_per_row, strict=True)]
    feature = _features_of_ids(rows)
    return [rows.ids[feature == f] for f in range(rows.lengths.shape[1])]


def count_values(source: RowSource, start: int, stop: int, features: Sequence[int], bad_rows: BadRows) -> ValueCounts:
    """Counts the values of some features in rows [start, stop) of ``source``, and closes it."""
    counts = ValueCounts(features)
    with closing(source):
        for row in range(start, stop, 65_536):
            counts.add(source.read(row, min(row + 65_536, stop), bad_rows))
    return counts


def save_vocabularies(path: str | Path, vocabularies: Mapping[str, Vocabulary]) -> None:
    """Writes an npz file with an array per feature, its values in the order of their ids, and one of their counts."""
    arrays = {feature: vocabulary.values for feature, vocabulary in vocabularies.items()}
    for feature, vocabulary in vocabularies.items():
        if vocabulary.counts is not None:
            arrays[_COUNTS + feature] = vocabulary.counts
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_vocabularies(path: str | Path, features: Sequence[str]) -> dict[str, Vocabulary]:
    """Returns those vocabularies of ``features`` that `save_vocabularies` wrote.

    Raises:
        DataError: the file is missing, unreadable, not an npz, or lacks a feature.
    """
    wrong = zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError
    with (
        readable(path, "a vocabulary that the preprocessing wrote", *wrong),
        np.load(path, allow_pickle=False) as arrays,
    ):
        if missing := [feature for feature in features if feature not in arrays]:
            found = ", ".join(name for name in arrays if not name.startswith(_COUNTS))
            raise DataError(str(path), f"no vocabulary of {missing[0]!r}; it has {found}")
        return {f: Vocabulary(arrays[f], arrays.get(_COUNTS + f)) for f in features}


class IdMapping:
    """Turns the ids of rows into rows of the features' tables.

    Args:
        kind (str): see `launch.sections.DataSection`.
        features (Sequence[str]): names, for messages.
        table_rows (Sequence[int]): S of each feature's table.
        vocabularies (Mapping[str, Vocabulary] | None): of each feature that is not raw, under ``"vocabulary"``; None
            there: the ids are already those of a vocabulary, and what is beyond a table becomes `UNKNOWN`.
        raw (Collection[str]): the features whose ids stay what they are, any number of 64 bits; a missing one is an id
            like others.
    """

    def __init__(
        self,
        kind: Literal["modulo", "vocabulary", "encoded"],
        features: Sequence[str],
        table_rows: Sequence[int],
        vocabularies: Mapping[str, Vocabulary] | None = None,
        raw: Collection[str] = (),
    ) -> None:
        self._kind = kind
        self._features = list(features)
        self._table_rows = np.array(table_rows, np.int64)
        self._vocabularies = vocabularies
        self._raw = np.array([feature in raw for feature in features])
        # Take 32 bits if they suffice, because half the memory is moved.
        self._dtype = np.int32 if max(table_rows) <= 2**31 and not self._raw.any() else np.int64

    def __call__(self, rows: Rows, bad_rows: BadRows, location: Location, quoted: Quoted) -> Rows:
        """Returns ``rows`` with rows of tables as ids.

        Args:
            rows (Rows): with ids as they were read.
            bad_rows (BadRows): gets ids that are outside their table, under ``"encoded"``.
            location (Location): of a row, by position in ``rows``.
            quoted (Quoted): returns the ids of a row and a feature as they stand in the file.

        Raises:
            DataError: ``bad_rows`` refuses a row.
        """
        feature = _features_of_ids(rows)
        limit = self._table_rows[feature]
        if self._kind == "vocabulary":
            return self._with_ids(rows, feature, self._looked_up(rows, feature, limit))
        ids = rows.ids
        if self._kind == "modulo":
            return self._with_ids(rows, feature, _remainder(ids, limit))
        outside = ((ids >= limit) | ((ids < 0) & (ids != MISSING))) & ~self._raw[feature]
        if not outside.any():
            return self._with_ids(rows, feature, np.maximum(ids, 0))
        mapped = self._with_ids(rows, feature, np.where(outside, 0, np.maximum(ids, 0)))
        return mapped.without(self._report(rows, outside, feature, bad_rows, location, quoted))

    def _with_ids(self, rows: Rows, feature: Array, ids: Array) -> Rows:
        """Returns ``rows`` with ``ids`` but for those of raw features, which stay."""
        if self._raw.any():
            ids = np.where(self._raw[feature], rows.ids, ids)
        return replace(rows, ids=ids.astype(self._dtype, copy=False))

    def _looked_up(self, rows: Rows, feature: Array, limit: Array) -> Array:
        if self._vocabularies is None:
            return np.where((rows.ids < limit) & (rows.ids > 0), rows.ids, UNKNOWN)
        ids = np.empty(rows.ids.shape, np.int64)
        for f in np.flatnonzero(~self._raw).tolist():
            where = np.flatnonzero(feature == f)
            part = (slice(None), slice(where[0], where[-1] + 1)) if rows.lengths is None else where
            if len(where):
                vocabulary = self._vocabularies[self._features[f]]
                ids[part] = vocabulary.ids(rows.ids[part], int(self._table_rows[f]))
        return ids

    def _report(
        self, rows: Rows, outside: Array, feature: Array, bad_rows: BadRows, location: Location, quoted: Quoted
    ) -> Array:
        row_of = np.nonzero(outside)[0]
        feature_of = np.broadcast_to(feature, outside.shape)[outside]
        if rows.lengths is not None:
            row_of = np.repeat(np.arange(len(rows)), rows.lengths.sum(1))[row_of]
        bad, first = np.unique(row_of, return_index=True)
        for row, i in zip(bad.tolist(), first.tolist(), strict=True):
            if rows.weights is None or rows.weights[row]:
                problem = partial(self._outside, int(feature_of[i]), partial(quoted, row))
                bad_rows.report(location(row), problem)
        return bad

    def _outside(self, feature: int, quoted: Callable[[int], str]) -> str:
        allowed = f"0..{self._table_rows[feature] - 1}, the rows of its table"
        return f"{self._features[feature]} is {quoted(feature)}; allowed: {allowed}"


def _remainder(ids: Array, rows: Array) -> Array:
    """Returns ids mod rows; ids are unsigned numbers of 64 bits, and a missing one becomes 0."""
    if ids.dtype.kind == "i" and ids.min(initial=0) < 0:
        wide = ids.astype(np.int64)
        return np.where(wide == MISSING, 0, (wide.view(np.uint64) % rows.astype(np.uint64)).astype(np.int64))
    return ids % rows.astype(ids.dtype) if np.iinfo(ids.dtype).max >= rows.max(initial=0) else ids % rows


def _features_of_ids(rows: Rows) -> Array:
    """Returns the feature of each id, or of each column of ids."""
    if rows.lengths is None:
        return np.repeat(np.arange(len(rows.ids_per_row)), rows.ids_per_row)
    features = np.broadcast_to(np.arange(rows.lengths.shape[1]), rows.lengths.shape)
    return np.repeat(features.reshape(-1), rows.lengths.reshape(-1))
