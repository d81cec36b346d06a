"""Some rows of a click log: label, dense numbers, and category ids per feature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MISSING = -(2**63)  # in place of an id that a row lacks; files may hold any other number of 64 bits


@dataclass(frozen=True)
class Rows:
    """B rows, row-major, so that rows are cheap to select; features come first only in a batch's KeyedJaggedTensor.

    Args:
        labels (Array): (B,) float32, 0 or 1.
        dense (Array): (B, number of dense features) float32; NaN if missing.
        ids (Array): of integers. Without ``lengths`` (B, ΣH): feature f has H_f ids in every row, side by side in the
            order of the features. With ``lengths`` (N,): row by row, in each feature by feature.
        ids_per_row (tuple[int, ...]): H_f; all 1, and without meaning, beside ``lengths``.
        lengths (Array | None): (B, F) number of ids, or None.
        weights (Array | None): (B,) float32, 0 for a row that does not count (malformed, or padding), 1 for all others;
            None: all 1.

    Example:
        >>> labels, dense, ids = np.float32([0, 1]), np.zeros((2, 1), np.float32), np.array([[1, 2, 3], [4, 5, 6]])
        >>> rows = Rows(labels, dense, ids, ids_per_row=(1, 2))
        >>> rows.take(np.array([1])).ids
        array([[4, 5, 6]])
    """

    labels: Array
    dense: Array
    ids: Array
    ids_per_row: tuple[int, ...]
    lengths: Array | None = None
    weights: Array | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Array) -> "Rows":
        """Returns the rows at ``index``, in its order."""
        if self.lengths is None:
            ids = self.ids.take(index, axis=0)
        else:
            counts = self.lengths.sum(1)
            ids = self.ids[segments(np.cumsum(counts) - counts, counts, index)]
        # take(index) has a quarter of the cost of [index].
        return self._each(lambda array: array.take(index, axis=0), ids)

    def cut(self, start: int, stop: int) -> "Rows":
        """Returns rows [start, stop), without copying."""
        first, end = start, stop
        if self.lengths is not None:
            first = int(self.lengths[:start].sum())
            end = first + int(self.lengths[start:stop].sum())
        return self._each(lambda array: array[start:stop], self.ids[first:end])

    def padded(self, num_rows: int) -> "Rows":
        """Returns these rows, followed by rows of weight 0 up to ``num_rows``."""
        missing = num_rows - len(self)
        if missing <= 0:
            return self
        ragged = self.lengths is not None
        ids = np.zeros((0,) if ragged else (missing, self.ids.shape[1]), self.ids.dtype)
        padding = Rows(
            labels=np.zeros(missing, np.float32),
            dense=np.zeros((missing, self.dense.shape[1]), np.float32),
            ids=ids,
            ids_per_row=self.ids_per_row,
            lengths=np.zeros((missing, len(self.ids_per_row)), np.int64) if ragged else None,
            weights=np.zeros(missing, np.float32),
        )
        return concat([self, padding])

    def without(self, bad: Array) -> "Rows":
        """Returns the same rows, those at ``bad`` with weight 0, label 0, dense values 0 and ids 0."""
        if len(bad) == 0:
            return self
        weights = np.ones(len(self), np.float32) if self.weights is None else self.weights.copy()
        labels, dense, ids = self.labels.copy(), self.dense.copy(), self.ids.copy()
        weights[bad], labels[bad], dense[bad] = 0, 0, 0
        if self.lengths is None:
            ids[bad] = 0
        else:
            counts = self.lengths.sum(1)
            ids[segments(np.cumsum(counts) - counts, counts, bad)] = 0
        return replace(self, weights=weights, labels=labels, dense=dense, ids=ids)

    def _each(self, pick: Callable[[Array], Array], ids: Array) -> "Rows":
        """Returns the rows that ``pick`` takes of each array, with their ``ids``."""
        lengths, weights = (None if array is None else pick(array) for array in (self.lengths, self.weights))
        return Rows(pick(self.labels), pick(self.dense), ids, self.ids_per_row, lengths, weights)


def concat(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all ``parts``, of which there is at least one; all have the same features and form."""
    if len(parts) == 1:
        return parts[0]
    weights = None
    if any(part.weights is not None for part in parts):
        weights = np.concatenate([np.ones(len(p), np.float32) if p.weights is None else p.weights for p in parts])
    lengths = None
    if any(part.lengths is not None for part in parts):
        parts = [ragged(part) for part in parts]
        lengths = np.concatenate([part.lengths for part in parts if part.lengths is not None])
    return Rows(
        labels=np.concatenate([part.labels for part in parts]),
        dense=np.concatenate([part.dense for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        ids_per_row=parts[0].ids_per_row,
        lengths=lengths,
        weights=weights,
    )


def ragged(rows: Rows) -> Rows:
    """Returns the same rows in the form with ``lengths``."""
    if rows.lengths is not None:
        return rows
    lengths = np.broadcast_to(np.array(rows.ids_per_row, np.int64), (len(rows), len(rows.ids_per_row)))
    return replace(rows, ids=rows.ids.reshape(-1), ids_per_row=(1,) * len(rows.ids_per_row), lengths=lengths)


def segments(starts: Array, counts: Array, order: Array) -> Array:
    """Returns the positions of the elements of the segments ``order``: segment i holds counts[i] from starts[i] on.

    Example:
        >>> segments(np.array([0, 2, 3]), np.array([2, 1, 3]), np.array([2, 0])).tolist()
        [3, 4, 5, 0, 1]
    """
    starts, counts = starts[order], counts[order]
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
