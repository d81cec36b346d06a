"""One variant of the step benchmark: a step from a rank's ids to stepped tables."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_cells import Batch, Tables, Traffic
from torchrec_qr import QuotientRemainder


class Variant:
    """One way to look up, compose, pool and step. ``traffic`` is what a planner takes into account."""

    compresses = True
    # True if it multiplies pooled rows, which differs from the others for several ids a bag.
    pools_first = False
    divides_by_ranks = True  # or each rank trains tables of its own, alone
    plan: dict[str, int]  # how many tables have which sharding type

    def __init__(self, tables: Tables, m: int, traffic: Traffic, device: torch.device) -> None:
        self.tables, self.traffic, self.device, self.plan = tables, traffic, device, {}
        self.spec = QuotientRemainder(num_collisions=m)
        self.partitions = [
            self.spec.bind(n) if self.compresses and n > tables.threshold else None for n in tables.sizes
        ]

    def out(self, batch: Batch) -> Tensor:
        """(B, F·D)."""
        raise NotImplementedError

    def backward(self, out: Tensor, gradient: Tensor) -> None:
        """Steps the rows as well."""
        out.backward(gradient)

    def step(self, batch: Batch, gradient: Tensor) -> Tensor:
        out = self.out(batch)
        self.backward(out, gradient)
        return out.detach()

    def names(self, f: int) -> list[str]:
        """The names of the tables of feature f in `state`."""
        name = self.tables.features[f]
        return [name] if self.partitions[f] is None else [f"{name}.partition_{j}" for j in range(2)]

    def classes(self, f: int, ids: Tensor) -> list[Tensor]:
        """The row of each id in each of these."""
        partitions = self.partitions[f]
        return [ids] if partitions is None else partitions.class_rows(ids)

    def state(self) -> dict[str, Any]:
        """Weights by name."""
        raise NotImplementedError

    def sums(self) -> dict[str, Any]:
        """Rowwise Adagrad's accumulators by the same names."""
        raise NotImplementedError


def uniform(weight: Tensor) -> Tensor:
    """Fills a table with values far from 0, so that no product of rows vanishes."""
    return nn.init.uniform_(weight, 0.5, 1.0)
