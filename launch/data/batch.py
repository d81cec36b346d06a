"""A batch as the model takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from launch.data.rows import Rows, ragged, segments


@dataclass
class Batch(Pipelineable):
    """B rows.

    Args:
        dense (Tensor): (B, dense features) float32.
        sparse (KeyedJaggedTensor): ids of F features.
        labels (Tensor): (B,) float32, 0 or 1.
        weights (Tensor): (B,) float32, 1; or 0 for rows that do not count: malformed ones, and padding to an equal
            number of batches on all ranks. These have label 0, dense features 0 and no ids.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(*(part.to(device, non_blocking=non_blocking) for part in self._parts()))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self._parts():
            part.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return Batch(*(part.pin_memory() for part in self._parts()))

    def _parts(self) -> tuple[Any, ...]:
        return self.dense, self.sparse, self.labels, self.weights


class BatchMaker:
    """Makes batches of rows whose ids and dense features are already as the model takes them.

    The numbers of ids of each feature are in a batch on the host, because input dist would wait for them on a GPU.

    Args:
        features (Sequence[str]): names, in the order of the rows' features.
        pinned (bool): whether batches are in pinned memory, from which a GPU copies them while the host goes on.
    """

    def __init__(self, features: Sequence[str], pinned: bool = False) -> None:
        self._features, self._pinned = list(features), pinned
        self._lengths: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def __call__(self, rows: Rows) -> Batch:
        weights = (
            torch.ones(len(rows)) if rows.weights is None else torch.from_numpy(np.ascontiguousarray(rows.weights))
        )
        batch = Batch(
            torch.from_numpy(np.ascontiguousarray(rows.dense)),
            self._sparse(rows),
            torch.from_numpy(np.ascontiguousarray(rows.labels)),
            weights,
        )
        return batch.pin_memory() if self._pinned else batch

    def _sparse(self, rows: Rows) -> KeyedJaggedTensor:
        if rows.lengths is None and rows.weights is None:
            values, lengths = self._fixed_values(rows), self._fixed_lengths(len(rows), rows.ids_per_row)
        else:
            values, lengths = _ragged_sparse(rows)
        return KeyedJaggedTensor(self._features, values, lengths=lengths, stride=len(rows)).sync()

    def _fixed_values(self, rows: Rows) -> Tensor:
        values = np.empty(rows.ids.size, np.int64)
        position = column = 0
        if max(rows.ids_per_row) == 1:
            values.reshape(len(rows.ids_per_row), len(rows))[:] = rows.ids.T
        else:
            for count in rows.ids_per_row:
                part = values[position : position + count * len(rows)].reshape(len(rows), count)
                part[:] = rows.ids[:, column : column + count]
                position, column = position + part.size, column + count
        return torch.from_numpy(values)

    def _fixed_lengths(self, num_rows: int, ids_per_row: tuple[int, ...]) -> Tensor:
        key = num_rows, ids_per_row
        if key not in self._lengths:
            self._lengths[key] = torch.tensor(ids_per_row, dtype=torch.int32).repeat_interleave(num_rows)
        return self._lengths[key]


def _ragged_sparse(rows: Rows) -> tuple[Tensor, Tensor]:
    rows = ragged(rows)
    assert rows.lengths is not None
    counts = rows.lengths.reshape(-1)
    starts = np.cumsum(counts) - counts
    if rows.weights is not None:
        counts = np.where(np.repeat(rows.weights > 0, rows.lengths.shape[1]), counts, 0)
    order = np.arange(len(counts)).reshape(rows.lengths.shape).T.reshape(-1)
    values = rows.ids[segments(starts, counts, order)].astype(np.int64)
    return torch.from_numpy(values), torch.from_numpy(counts[order].astype(np.int32))
