"""Checks a timed variant: one step of it against float64, outputs and stepped rows, on some features."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step_cells import EPS, LR, Tables, batch, upstream
from benchmarks.step_variants import Full, Variant

# Features looked at: the first and the last, which lie on different ranks under table-wise.
_FEATURES = (0, -1)


def check(variant: Variant, bags: int, hot: int, number: int) -> float:
    """Runs one step on batch ``number``; returns the largest error relative to the largest value.

    Raises:
        AssertionError: an error above 1e-4.
    """
    tables, rank, world_size = variant.tables, dist.get_rank(), dist.get_world_size()
    features = [f % tables.num_features for f in _FEATURES]
    ranks = range(world_size) if variant.divides_by_ranks else [rank]
    ids = {r: batch(tables, hot, bags, r, number).view(tables.num_features, bags, hot) for r in ranks}
    gradients = {r: upstream(tables, bags, r).view(bags, tables.num_features, tables.dim).double() for r in ranks}
    before = {f: _rows_of(variant, f, ids) for f in features}
    sums = {f: _sums_of(variant, f, ids) for f in features} if tables.optimizer != "sgd" else {}
    out = variant.step(ids[rank].reshape(-1), bags, hot, upstream(tables, bags, rank))
    errors = [0.0]
    for f in features:
        weights = [w.clone().requires_grad_() for w, _ in before[f]]
        total = torch.zeros((), dtype=torch.float64)
        for r in ranks:
            expected = _pooled(variant, weights, [places[r] for _, places in before[f]])
            if r == rank:
                actual = out.view(bags, tables.num_features, -1)[:, f].double()
                errors.append(_error(actual, expected.detach()))
            total = total + (expected * gradients[r][:, f]).sum() / len(ranks)
        total.backward()
        for j, (after, _) in enumerate(_rows_of(variant, f, ids)):
            gradient = weights[j].grad
            assert gradient is not None
            if tables.optimizer == "sgd":
                moved = LR * gradient
            else:
                h = sums[f][j] + _mean_of_squares(gradient, tables, variant)
                moved = LR * gradient / (h.sqrt() + EPS)
            # Of the step itself, not of the rows, which are much larger.
            errors.append(_error(weights[j].detach() - after, moved, floor=1e-7))
    worst = max(errors)
    assert worst < 2e-3, f"{type(variant).__name__}: {worst} off the float64 step"
    return worst


def _pooled(variant: Variant, weights: list[Tensor], places: list[Tensor]) -> Tensor:
    """(B, D) from rows and, per table, the place (B, hot) of each id's row among them."""
    rows = [w[p] for w, p in zip(weights, places, strict=True)]
    if len(rows) == 1:
        return rows[0].sum(1)
    return rows[0].sum(1) * rows[1].sum(1) if variant.pools_first else (rows[0] * rows[1]).sum(1)


def _classes(variant: Variant, ids: Tensor) -> list[Tensor]:
    return [ids] if isinstance(variant, Full) else variant.partitions.class_rows(ids)


def _rows_of(variant: Variant, f: int, ids: dict[int, Tensor]) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Per table of a feature: the rows that the batch looks up, and per rank each id's place among them."""
    state = variant.state()
    out = []
    for j, name in enumerate(variant.names(variant.tables.features[f])):
        classes = {r: _classes(variant, x[f])[j] for r, x in ids.items()}
        unique, inverse = torch.cat([c.reshape(-1) for c in classes.values()]).unique(return_inverse=True)
        places = dict(zip(classes, inverse.view(len(classes), *next(iter(classes.values())).shape), strict=True))
        out.append((_gathered(state[name], unique, variant.tables.dim, variant.divides_by_ranks), places))
    return out


def _gathered(value: Any, rows: Tensor, dim: int, shared: bool) -> Tensor:
    """Rows of a tensor in float64, from the ranks that hold them."""
    if not hasattr(value, "local_shards"):
        return value.detach()[rows].double()
    out = torch.zeros(len(rows), dim, dtype=torch.float64)
    for shard in value.local_shards():
        (_, column), (_, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        out[:, column : column + columns] = shard.tensor[rows].double()
    if shared:
        dist.all_reduce(out)
    return out


def _sums_of(variant: Variant, f: int, ids: dict[int, Tensor]) -> list[Tensor]:
    """Per table of a feature, the accumulators of the rows that the batch looks up, one per column."""
    state, tables = variant.sums(), variant.tables
    out = []
    for j, name in enumerate(variant.names(variant.tables.features[f])):
        rows = torch.cat([_classes(variant, x[f])[j].reshape(-1) for x in ids.values()]).unique()
        value = state.get(name)  # None on a rank that stores nothing of the table
        total = torch.zeros(len(rows), tables.dim, dtype=torch.float64)
        if value is not None and not hasattr(value, "local_shards"):
            out.append(value.detach()[rows].double().unsqueeze(1).expand_as(total))
            continue
        if value is not None:
            blocks = _blocks(tables)
            size = sum(s.shard_sizes[0] for s in value.metadata().shards_metadata) // len(blocks)
            for shard in value.local_shards():
                a, b = blocks[shard.metadata.shard_offsets[0] // size]
                total[:, a:b] = shard.tensor.view(-1)[rows].double().unsqueeze(1)
        if variant.divides_by_ranks:
            dist.all_reduce(total)
        out.append(total)
    return out


def _blocks(tables: Tables) -> list[tuple[int, int]]:
    """Blocks of columns with an accumulator of their own."""
    if tables.sharding != "column_wise":
        return [(0, tables.dim)]
    width = max(tables.dim // 2, 4)
    return [(a, a + width) for a in range(0, tables.dim, width)]


def _mean_of_squares(gradient: Tensor, tables: Tables, variant: Variant) -> Tensor:
    out = torch.empty_like(gradient)
    for a, b in _blocks(tables):
        out[:, a:b] = gradient[:, a:b].square().mean(dim=1, keepdim=True)
    return out


def _error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return float((actual - expected).abs().max() / (expected.abs().max() + floor))
