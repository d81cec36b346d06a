"""The values of a compositional collection, in float64 and a few obvious lines. Imports nothing from the library."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RowsOf = Callable[[int], tuple[int, ...]]


def quotient_remainder(num_ids: int, num_collisions: int, grouping: str) -> RowsOf:
    """The paper's Algorithm 2 ("strided") and the dlrm code's assignment ("adjacent")."""
    if grouping == "adjacent":
        return lambda x: (x // num_collisions, x % num_collisions)
    first = -(-num_ids // num_collisions)
    return lambda x: (x % first, x // first)


def mixed_radix(sizes: list[int]) -> RowsOf:
    return lambda x: tuple(x // math.prod(sizes[:j]) % m for j, m in enumerate(sizes))


def chinese_remainder(sizes: list[int]) -> RowsOf:
    return lambda x: tuple(x % m for m in sizes)


def hashed(rows_of: RowsOf, num_ids: int, seed: int) -> RowsOf:
    """The output of a SplitMix64 generator whose state is x + seed · increment, without its lowest bit, mod S."""

    def word(x: int) -> int:
        return x % (1 << 64)

    def row(x: int) -> tuple[int, ...]:
        state = word(x + (1 + seed) * 0x9E3779B97F4A7C15)
        state = word((state ^ state // 2**30) * 0xBF58476D1CE4E5B9)
        state = word((state ^ state // 2**27) * 0x94D049BB133111EB)
        return rows_of((state ^ state // 2**31) // 2 % num_ids)

    return row


def explicit(classes: list[list[int]]) -> RowsOf:
    return lambda x: tuple(c[x] for c in classes)


@dataclass
class OracleTable:
    """``weights`` are the K stored tensors in float64, as leaves; a path's MLPs are rows W1, b1, W2, b2, flattened."""

    rows_of: RowsOf
    weights: list[Tensor]
    operation: str
    pooling: str = "sum"
    path_hidden: int | None = None
    path_activation: str = "relu"

    def embed(self, x: int) -> Tensor:
        parts = [w[r] for w, r in zip(self.weights, self.rows_of(x), strict=True)]
        if self.operation == "concat":
            return torch.cat(parts)
        out = parts[0]
        for part in parts[1:]:
            if self.operation == "mult":
                out = out * part
            elif self.operation == "add":
                out = out + part
            else:
                out = self.mlp(part, out)
        return out

    def mlp(self, flat: Tensor, x: Tensor) -> Tensor:
        d, h = len(x), self.path_hidden
        if h is None:
            return flat[: d * d].view(d, d) @ x + flat[d * d :]
        a, b, c = h * d, h * d + h, h * d + h + d * h
        hidden = flat[:a].view(h, d) @ x + flat[a:b]
        hidden = hidden.clamp(min=0) if self.path_activation == "relu" else hidden.tanh()
        return flat[b:c].view(d, h) @ hidden + flat[c:]

    def pool(self, bags: list[list[int]], weights: list[Tensor] | None = None) -> Tensor:
        """(B, D): compose per id, then weight, then pool; MEAN divides by the number of ids."""
        dim = len(self.embed(0))
        rows = []
        for b, bag in enumerate(bags):
            out = torch.zeros(dim, dtype=torch.float64)
            for n, x in enumerate(bag):
                out = out + self.embed(x) * (1 if weights is None else weights[b][n])
            rows.append(out / len(bag) if self.pooling == "mean" and bag else out)
        return torch.stack(rows) if rows else torch.zeros(0, dim, dtype=torch.float64)
