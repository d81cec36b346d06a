"""One rule for all readers: which labels and dense values make a row good."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from launch.data.rows import Array, Rows
from launch.data.source import Block

# It returns the value of a row in a column as it stands in the file.
Quote = Callable[[int, str], str]


@dataclass(frozen=True)
class Labels:
    """The rule by which labels are read.

    Args:
        optional (bool): a file, or a row of it, may lack its label, which is then NaN.
        above (float | None): a greater value is the label 1, every other one 0; None: a label is 0 or 1.
    """

    optional: bool = False
    above: float | None = None


BINARY = Labels()  # each is there, and is 0 or 1


@dataclass(frozen=True)
class Validity:
    """A label is 0 or 1, or under a threshold any finite number; a dense value is a finite float32, or missing.

    Args:
        label (str): column of the label, for messages.
        dense (Sequence[str]): columns of the dense features.
        labels (Labels): how they are read.
    """

    label: str
    dense: Sequence[str]
    labels: Labels

    def block(
        self,
        labels: Array,
        dense: Array,
        ids: Array,
        ids_per_row: tuple[int, ...],
        lengths: Array | None,
        wrong_ids: dict[int, str],
        quote: Quote,
    ) -> Block:
        """Returns rows, the bad ones with weight 0, and what is wrong with those.

        Args:
            labels (Array): (B,) of any kind of number; NaN if missing.
            dense (Array): (B, dense features) float32; NaN if missing.
            ids (Array): as in `Rows`.
            ids_per_row (tuple[int, ...]): as in `Rows`.
            lengths (Array | None): as in `Rows`.
            wrong_ids (dict[int, str]): by position, what is wrong with ids.
            quote (Quote): returns the value of a row in a column.
        """
        problems: dict[int, str] = {}
        allowed = "0, 1" if self.labels.above is None else "a finite number"
        for i in np.flatnonzero(self._wrong_labels(labels)).tolist():
            problems[i] = f"{self.label} is {quote(i, self.label)}; allowed: {allowed}"
        infinite = np.isinf(dense)
        if infinite.any():
            for i, j in np.argwhere(infinite).tolist():
                column = self.dense[j]
                problems.setdefault(i, f"{column} is {quote(i, column)}; allowed: a finite number or nothing")
        for i, problem in wrong_ids.items():
            problems.setdefault(i, problem)
        with np.errstate(over="ignore"):  # of wrong labels, which become 0
            rows = Rows(self._as_labels(labels), dense, ids, ids_per_row, lengths)
        return rows.without(np.array(sorted(problems), np.int64)), problems

    def _wrong_labels(self, labels: Array) -> Array:
        wrong = (labels != 0) & (labels != 1) if self.labels.above is None else ~np.isfinite(labels)
        return wrong & ~np.isnan(labels) if self.labels.optional else wrong

    def _as_labels(self, labels: Array) -> Array:
        if self.labels.above is None:
            return labels.astype(np.float32)
        return np.where(np.isnan(labels), np.float32(np.nan), (labels > self.labels.above).astype(np.float32))
