"""The cells of the step benchmark: what is trained, and on which batches."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from torchrec_qr.distributed.fused_params import OPTIMIZERS

LR, EPS = 0.01, 1e-8


@dataclass(frozen=True)
class Tables:
    """One table per feature, and how they are sharded and stepped.

    Args:
        sizes: number of ids of each.
        dim: D of all.
        optimizer: one of `OPTIMIZERS`.
        sharding: TorchRec's sharding type of all tables; None: a planner chooses for each.
        threshold: a table of no more ids is never compressed.
    """

    sizes: tuple[int, ...]
    dim: int
    optimizer: str
    sharding: str | None = None
    threshold: int = 0

    @property
    def features(self) -> list[str]:
        return [f"f{i}" for i in range(len(self.sizes))]

    @property
    def fused_params(self) -> dict[str, object]:
        return {**OPTIMIZERS[self.optimizer].fused_params, "learning_rate": LR, "eps": EPS}


@dataclass(frozen=True)
class Traffic:
    """The lookups of a rank in a step: ``bags`` of each feature, which have ``ids_per_bag[f]`` ids each.

    Ids are in order of frequency: that of id k is in proportion to (k + 1) ** -``exponent``. 0 makes all alike.
    """

    bags: int
    ids_per_bag: tuple[int, ...]
    exponent: float = 0.0


@dataclass(frozen=True)
class Cell:
    """Variants that are measured in turn; ``ms``: numbers of ids that share a row."""

    tables: Tables
    ms: tuple[int, ...]
    traffics: tuple[Traffic, ...]
    variants: tuple[str, ...]


class Batch:
    """``ids[f]`` (B, ids_per_bag[f]); the same as one tensor ``values``, with ``lengths`` and ``offsets`` of bags."""

    def __init__(self, tables: Tables, traffic: Traffic, rank: int, number: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1000 * rank + number)
        bags, ids_per_bag = traffic.bags, traffic.ids_per_bag
        of_tables = zip(tables.sizes, ids_per_bag, strict=True)
        drawn = [_draw(n, bags * hot, traffic.exponent, generator) for n, hot in of_tables]
        lengths = torch.tensor(ids_per_bag).repeat_interleave(bags)
        self.values = torch.cat(drawn).to(device)
        self.lengths = lengths.to(device)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
        self.ids = [x.view(bags, -1) for x in self.values.split([bags * hot for hot in ids_per_bag])]
        self._features = tables.features

    def kjt(self) -> KeyedJaggedTensor:
        """Returns a new one each time, since TorchRec keeps in it what it has computed from it."""
        return KeyedJaggedTensor(keys=self._features, values=self.values, lengths=self.lengths)


def upstream(tables: Tables, bags: int, rank: int, device: torch.device) -> Tensor:
    """(B, F·D), the gradient of a rank's output."""
    generator = torch.Generator().manual_seed(77 + rank)
    return torch.rand(bags, len(tables.sizes) * tables.dim, generator=generator).to(device)


def _draw(num_ids: int, count: int, exponent: float, generator: torch.Generator) -> Tensor:
    if not exponent:
        return torch.randint(0, num_ids, (count,), generator=generator)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    # Round x of the continuous density x ** -exponent on [1, num_ids + 1) down, since its inverse is a formula.
    if exponent == 1:
        x = (num_ids + 1) ** uniform
    else:
        power = 1 - exponent
        x = (1 + uniform * ((num_ids + 1) ** power - 1)) ** (1 / power)
    return x.long().sub_(1).clamp_(0, num_ids - 1)
