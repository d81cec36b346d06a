"""Checks a timed variant: one step of it against float64, all outputs of this rank, and all rows that were stepped.

The reference gathers the rows that the batches of all ranks look up, and computes on them in plain PyTorch.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step_cells import EPS, LR, Batch, Tables, Traffic, upstream
from benchmarks.step_variant import Variant
from torchrec_qr import raise_pending

# Allow what float32 may be off. An output errs in proportion to the absolute values that it sums up; a row's step errs
# in proportion to the step, and to the row, whose last digits the step rounds.
_OF_SUM, _OF_STEP, _OF_ROW = 1e-5, 1e-3, 1e-6
_IDS_AT_ONCE = 2**16  # bounds the memory of the reference, which has a row for each


class Verdict(NamedTuple):
    """The largest error of all ranks, over what is allowed there; and, where that is above 1, what differs."""

    error: float
    wrong: str | None


class _Rows(NamedTuple):
    """The rows of one tensor that the batches look up, in float64, and per rank the place of each id's among them."""

    weight: Tensor
    places: dict[int, Tensor]


def check(variant: Variant, traffic: Traffic, number: int) -> Verdict:
    """Runs one step on batch ``number`` of every rank, all of which must call this together.

    Raises:
        IndexError: on CUDA, an id that a kernel has found outside of its table.
    """
    tables, device, rank = variant.tables, variant.device, dist.get_rank()
    ranks = range(dist.get_world_size()) if variant.divides_by_ranks else [rank]
    batches = {r: Batch(tables, traffic, r, number, device) for r in ranks}
    gradients = {r: upstream(tables, traffic.bags, r, device) for r in ranks}
    before = _rows_of(variant, batches)
    sums = _sums_of(variant, batches) if tables.optimizer != "sgd" else None
    out = variant.step(batches[rank], gradients[rank]).view(traffic.bags, len(tables.sizes), tables.dim)
    raise_pending()
    after = _rows_of(variant, batches)
    worst = Verdict(0.0, None)
    for f, name in enumerate(tables.features):
        weights = [rows.weight.clone().requires_grad_() for rows in before[f]]
        for r in ranks:
            of_rank = gradients[r].view(out.shape)[:, f].double() / len(ranks)
            for bags in torch.arange(traffic.bags).split(max(1, _IDS_AT_ONCE // traffic.ids_per_bag[f])):
                span = slice(int(bags[0]), int(bags[-1]) + 1)
                places = [rows.places[r][span] for rows in before[f]]
                expected = _pooled(variant, weights, places)
                if r == rank:
                    mass = _pooled(variant, [w.detach().abs() for w in weights], places)
                    worst = _worse(worst, f"output of {name}", out[span, f], expected.detach(), _OF_SUM * mass)
                (expected * of_rank[span]).sum().backward()
        for j, (table, weight, old, new) in enumerate(zip(variant.names(f), weights, before[f], after[f], strict=True)):
            assert weight.grad is not None
            moved = LR * weight.grad
            if sums is not None:
                moved /= (sums[f][j] + _mean_of_squares(weight.grad, tables)).sqrt() + EPS
            expected = old.weight - moved
            size = old.weight.abs() + expected.abs()
            allowed = (_OF_STEP * moved.abs() + _OF_ROW * size).amax(dim=1, keepdim=True)
            worst = _worse(worst, f"rows of {table} after a step", new.weight, expected, allowed)
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, worst)
    verdict: Verdict = max(of_all, key=lambda of_rank: of_rank.error)
    return verdict


def _worse(worst: Verdict, what: str, actual: Tensor, expected: Tensor, allowed: Tensor) -> Verdict:
    off = ((actual.double() - expected).abs() / allowed.clamp(min=1e-30)).nan_to_num(nan=torch.inf)
    error = float(off.max())
    if error <= worst.error:
        return worst
    at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    wrong = f"{what}, at {at}: {float(actual[at]):.9g}; float64: {float(expected[at]):.9g}" if error > 1 else None
    return Verdict(error, wrong)


def _pooled(variant: Variant, weights: list[Tensor], places: list[Tensor]) -> Tensor:
    """(B, D) from rows and, per table, the place (B, hot) of each id's row among them."""
    rows = [w[p] for w, p in zip(weights, places, strict=True)]
    if len(rows) == 1:
        return rows[0].sum(1)
    return rows[0].sum(1) * rows[1].sum(1) if variant.pools_first else (rows[0] * rows[1]).sum(1)


def _looked_up(variant: Variant, f: int, batches: dict[int, Batch]) -> list[tuple[str, Tensor, dict[int, Tensor]]]:
    """Per tensor of a feature's table: its name, the rows that batches look up, and the places of ids among them."""
    of_ranks = [variant.classes(f, batch.ids[f]) for batch in batches.values()]
    found = []
    for name, classes in zip(variant.names(f), zip(*of_ranks, strict=True), strict=True):
        unique, inverse = torch.stack(classes).unique(return_inverse=True)
        found.append((name, unique, dict(zip(batches, inverse, strict=True))))
    return found


def _rows_of(variant: Variant, batches: dict[int, Batch]) -> list[list[_Rows]]:
    """Per feature, and per tensor of its table; a collective where ranks share tables."""
    state = variant.state()
    return [
        [_Rows(_gathered(state[name], rows, variant), places) for name, rows, places in _looked_up(variant, f, batches)]
        for f in range(len(variant.tables.sizes))
    ]


def _gathered(value: Any, rows: Tensor, variant: Variant) -> Tensor:
    """Rows of a tensor in float64, from the ranks that hold them; of a replicated one, this rank's.

    Copies of nodes are averaged, so that a difference between them shows.
    """
    if not hasattr(value, "local_shards"):
        own: Tensor = value.detach()[rows].double()
        return own
    out = torch.zeros(len(rows), variant.tables.dim, dtype=torch.float64, device=rows.device)
    copies = torch.zeros_like(out)
    for shard in value.local_shards():
        (first, column), (size, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        here = (rows >= first) & (rows < first + size)
        out[here, column : column + columns] = shard.tensor[rows[here] - first].double()
        copies[here, column : column + columns] = 1
    dist.all_reduce(out)
    dist.all_reduce(copies)
    return out / copies


def _sums_of(variant: Variant, batches: dict[int, Batch]) -> list[list[Tensor]]:
    """Rowwise Adagrad's accumulators as `_rows_of` has rows, one per column; the sharding must not split rows."""
    state, tables = variant.sums(), variant.tables
    out: list[list[Tensor]] = []
    for f in range(len(tables.sizes)):
        out.append([])
        for name, rows, _ in _looked_up(variant, f, batches):
            value = state.get(name)  # None on a rank that stores nothing of the table
            total = torch.zeros(len(rows), tables.dim, dtype=torch.float64, device=rows.device)
            if value is not None and not hasattr(value, "local_shards"):
                out[-1].append(value.detach()[rows].double().unsqueeze(1).expand_as(total))
                continue
            if value is not None:
                blocks = _blocks(tables)
                size = sum(s.shard_sizes[0] for s in value.metadata().shards_metadata) // len(blocks)
                for shard in value.local_shards():
                    a, b = blocks[shard.metadata.shard_offsets[0] // size]
                    total[:, a:b] = shard.tensor.view(-1)[rows].double().unsqueeze(1)
            if variant.divides_by_ranks:
                dist.all_reduce(total)
            out[-1].append(total)
    return out


def _blocks(tables: Tables) -> list[tuple[int, int]]:
    """Blocks of columns with an accumulator of their own."""
    if tables.sharding != "column_wise":
        return [(0, tables.dim)]
    width = max(tables.dim // 2, 4)
    return [(a, a + width) for a in range(0, tables.dim, width)]


def _mean_of_squares(gradient: Tensor, tables: Tables) -> Tensor:
    out = torch.empty_like(gradient)
    for a, b in _blocks(tables):
        out[:, a:b] = gradient[:, a:b].square().mean(dim=1, keepdim=True)
    return out
