"""Batches of all ranks together, which tables and the number of a step determine, whatever the number of ranks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ranks import own_device
from torchrec import KeyedJaggedTensor

BAGS = 8


@dataclass
class Batch:
    """Bags of ids and their weights, per feature."""

    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    weights: dict[str, list[list[float]]] = field(default_factory=dict)

    def part(self, rank: int, world_size: int) -> "Batch":
        """The bags of one rank."""

        def cut(bags: list[Any]) -> list[Any]:
            size = len(bags) // world_size
            return bags[rank * size : (rank + 1) * size]

        return Batch({f: cut(b) for f, b in self.ids.items()}, {f: cut(b) for f, b in self.weights.items()})

    def kjt(self, weighted: bool = False, int32: bool = False) -> KeyedJaggedTensor:
        ids = [x for bags in self.ids.values() for bag in bags for x in bag]
        weights = [w for bags in self.weights.values() for bag in bags for w in bag]
        dtype = torch.int32 if int32 else torch.int64
        return KeyedJaggedTensor(
            keys=list(self.ids),
            values=torch.tensor(ids, dtype=dtype),
            lengths=torch.tensor([len(bag) for bags in self.ids.values() for bag in bags], dtype=dtype),
            weights=torch.tensor(weights) if weighted else None,
        )


def global_batch(configs: Sequence[Any], step: int, bags: int = BAGS, wild_ids: bool = False, bits: int = 64) -> Batch:
    """Jagged, with empty bags, and of few ids, so that rows stay untouched; on step 1 only the first bags have ids.

    On step 2 the first feature has no ids on any rank. ``wild_ids``: outside of [0, S), too, where
    the table takes them. A table that hashes ids has any of so many ``bits``.
    """
    rng = random.Random(f"batch {step}")
    tables = {f: config for config in reversed(configs) for f in config.feature_names}
    batch = Batch()
    for i, (feature, table) in enumerate(reversed(tables.items())):  # in another order than the tables'
        size = table.num_embeddings
        pool = rng.sample(range(size), min(12, size - 2))
        if wild_ids and getattr(table, "out_of_range", "error") in ("clamp", "wrap"):
            pool += [size, -1, 3 * size + 5]
        if getattr(table, "id_hash", None) is not None:
            pool = [rng.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in pool]
        of_feature = [rng.choices(pool, k=rng.choice([0, 1, 2, 3, 5])) for _ in range(bags)]
        if step == 1:
            of_feature = [bag if b < bags // 4 else [] for b, bag in enumerate(of_feature)]
        if step == 2 and i == 0:
            of_feature = [[] for _ in of_feature]
        batch.ids[feature] = of_feature
        # Multiples of 1/64: exact in every storage type.
        batch.weights[feature] = [[rng.randrange(32, 128) / 64 for _ in bag] for bag in of_feature]
    return batch


def batch_of(
    configs: Sequence[Any], step: int, rank: int, world_size: int, weighted: bool = False
) -> KeyedJaggedTensor:
    """The samples of one rank, on its device."""
    return global_batch(configs, step).part(rank, world_size).kjt(weighted).to(own_device())
