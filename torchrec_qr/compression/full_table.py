"""A full table that partitions are fitted to, read in blocks of rows."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_qr.ops.partition_layouts import partition_layouts
from torchrec_qr.partitions import BoundPartitions

# Read so many scalars at a time, because a copy of the table may not fit. On a CPU the caches hold a block, and torch
# uses one thread for it: on a busy host several threads wait longer for one another than they work.
_CPU_BLOCK = 1 << 14
_DEVICE_BLOCK = 1 << 24
# Let ids of weight 0 decide what no other id does. A row of theirs alone then fits them, and no other row moves.
_LEAST_WEIGHT = 1e-9
_MOST_CELLS_PER_ID = 4


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a table, and their weights in float64."""

    first: int
    rows: Tensor
    weights: Tensor | None

    @property
    def ids(self) -> slice:
        """The ids."""
        return slice(self.first, self.first + len(self.rows))

    def energy(self, values: Tensor) -> Tensor:
        """Returns Σ_x w_x values[x]² of each column, (D,) in float64."""
        squares = values.to(torch.float64).square()
        # Do not multiply by a matrix, because its threads wait for one another on a busy host.
        return (squares if self.weights is None else squares * self.weights.unsqueeze(1)).sum(0)


class FullTable:
    """The rows E (S, D) of a full table, the weights of ids, and the classes of ids.

    Args:
        rows (Tensor): E, of any floating type.
        bound (BoundPartitions): partitions of the S ids.
        frequencies (Tensor | None): (S,), at least 0. Weights are these, scaled to a mean of 1. Default: all alike.
        name (str): of the table, for messages.
    """

    def __init__(self, rows: Tensor, bound: BoundPartitions, frequencies: Tensor | None = None, name: str = "") -> None:
        self.rows, self.bound, self.name = rows, bound, name
        self.weights: Tensor | None = None
        if frequencies is not None:
            weights = frequencies.to(rows.device, torch.float64)
            self.weights = weights / weights.mean() + _LEAST_WEIGHT
        # Keep what no column changes, because tables of some columns of this one share it.
        self._of_ids: dict[tuple[int, ...], Tensor] = {}

    def of_columns(self, columns: slice) -> "FullTable":
        """Returns the table of some columns."""
        table = copy(self)
        table.rows = self.rows[:, columns]
        return table

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[Block]:
        """Yields the table, block by block."""
        scalars = _CPU_BLOCK if self.rows.device.type == "cpu" else _DEVICE_BLOCK
        step = max(1, scalars // self.rows.shape[1])
        for first in range(0, len(self.rows), step):
            part = slice(first, first + step)
            weights = None if self.weights is None else self.weights[part]
            yield Block(first, self.rows[part].to(dtype), weights)

    def zeros(self, j: int, columns: int) -> Tensor:
        """Returns sums of partition j before any id is added, (|P_j|, columns)."""
        return torch.zeros(self.bound.sizes[j], columns, dtype=torch.float64, device=self.rows.device)

    def add(self, out: Tensor, values: Tensor, block: Block, j: int) -> None:
        """Adds the weighted values of a block's ids to the sums of their classes: out[p_j(x)] += w_x · values[x]."""
        classes, values = self.classes(j)[block.ids], values.to(out.dtype)
        if out.device.type != "cpu":
            weighted = values if block.weights is None else values * block.weights.unsqueeze(1)
            out.index_add_(0, classes, weighted)
            return
        # Multiply by a sparse matrix of weights, because `index_add_` takes ten times as long on a CPU.
        cells = torch.stack([classes, torch.arange(len(classes), device="cpu")])
        weights = torch.ones_like(classes, dtype=out.dtype) if block.weights is None else block.weights
        out.addmm_(_sparse(cells, weights, (len(out), len(classes))), values)

    def row_of_each(self, rows: Tensor, j: int, block: Block) -> Tensor:
        """Returns the row of partition j that each id of a block selects, (N, D_j)."""
        return rows.index_select(0, self.classes(j)[block.ids])

    def means(self, columns: list[slice]) -> list[Tensor]:
        """Returns for each partition the mean of its columns over the ids of each class, in one pass."""
        sums = [self.zeros(j, of.stop - of.start) for j, of in enumerate(columns)]
        for block in self.blocks():
            for j, of in enumerate(columns):
                self.add(sums[j], block.rows[:, of], block, j)
        return [s / self.totals(j) for j, s in enumerate(sums)]

    def classes(self, j: int) -> Tensor:
        """Returns the class of each id in partition j, (S,) int64 on the device of the rows."""
        return self._once((0, j), lambda: self._computed_classes(j))

    def totals(self, j: int) -> Tensor:
        """Returns the weight of each class of partition j, (|P_j|, 1), and 1 for a class without ids."""
        return self._once((1, j), lambda: self._computed_totals(j))

    def shares(self, i: int, j: int) -> Tensor:
        """Returns the weight of each pair of classes, (|P_i|, |P_j|): dense if few pairs have no ids, else sparse."""
        return self._once((2, i, j), lambda: self._computed_shares(i, j))

    def _once(self, key: tuple[int, ...], compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._of_ids:
            self._of_ids[key] = compute()
        return self._of_ids[key]

    def _computed_classes(self, j: int) -> Tensor:
        (layout,) = partition_layouts(self.bound, {j: self.rows.shape[1]})
        ids = torch.arange(len(self.rows), device="cpu")
        return layout.rows_of(ids, self.bound.class_map).to(self.rows.device)

    def _computed_totals(self, j: int) -> Tensor:
        totals = torch.bincount(self.classes(j), self.weights, self.bound.sizes[j]).to(torch.float64)
        return totals.where(totals > 0, 1.0).unsqueeze(1)

    def _computed_shares(self, i: int, j: int) -> Tensor:
        rows, columns = self.bound.sizes[i], self.bound.sizes[j]
        if rows * columns <= _MOST_CELLS_PER_ID * len(self.rows):
            cells = torch.bincount(self.classes(i) * columns + self.classes(j), self.weights, rows * columns)
            return cells.to(torch.float64).view(rows, columns)
        indices = torch.stack([self.classes(i), self.classes(j)])
        ones = torch.ones(len(self.rows), dtype=torch.float64, device=indices.device)
        weights = ones if self.weights is None else self.weights
        return _sparse(indices, weights, (rows, columns)).coalesce()


def _sparse(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # Turn the checks of indices off, because they are classes, and because torch warns if nothing decides.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_coo_tensor(indices, values, shape, device=values.device)
