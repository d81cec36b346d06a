"""The lookup of a group of tables at once without pooling, which has an output, and a gradient, for each feature."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchrec_qr.ops.arguments import Batch, DenseGradient, Outcome, rows_apart
from torchrec_qr.ops.backends import torch as pytorch
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.dispatch import kernels_on, kernels_take
from torchrec_qr.ops.operators import lookup_op
from torchrec_qr.ops.transforms import is_traced


def look_up_features(tables: Description, weights: list[Tensor], batch: Batch) -> list[Tensor]:
    """Returns (N, D) fp32 of each feature, compose_j( W_j[row_j(x_n)] ); differentiable.

    Each output may have a backward of its own, as if each feature had its own lookup. The weights of a table have a
    gradient if an output of the table has.

    Args:
        tables: what is looked up, consecutive features of the batch.
        weights: as `torchrec_qr.ops.lookup.look_up` has them.
        batch: ids, offsets and starts of features; not pooled, and without weights of ids.

    Raises:
        As `torchrec_qr.ops.lookup.look_up`.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout, TableLayout
        >>> tables = Description([TableLayout("add", (PartitionLayout(4, 1, 3),), 2, num_ids=3)], ["t"])
        >>> batch = Batch(torch.tensor([2, 0, 2]), torch.tensor([0, 1, 3]), None, pooled=False, starts=[0, 1, 3])
        >>> [out[:, 0].tolist() for out in look_up_features(tables, [torch.arange(12.0).view(3, 4)], batch)]
        [[8.0], [0.0, 8.0]]
    """
    if not kernels_take(tables, weights):
        return pytorch.look_up_features(tables, weights, batch)
    weights = rows_apart(weights)
    if is_traced(weights[0], batch.ids):
        flat = lookup_op(weights, tables.class_maps, batch.ids, batch.offsets, None, tables.text, pooled=False)
        return _pieces(flat, _shapes(tables, batch))
    out: tuple[Tensor, ...] = _FeatureLookup.apply(tables, batch, *weights)
    return list(out)


def _shapes(tables: Description, batch: Batch) -> list[tuple[int, int]]:
    assert batch.starts is not None
    return [(end - start, dim) for (start, end), dim in zip(pairwise(batch.starts), tables.dims, strict=True)]


def _pieces(flat: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    pieces = flat.split([rows * columns for rows, columns in shapes]) if len(shapes) > 1 else [flat]
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class _FeatureLookup(torch.autograd.Function):
    """The kernels' forward and backward. A feature whose output has no gradient adds nothing, not even zeros."""

    @staticmethod
    def forward(ctx: Any, tables: Description, batch: Batch, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        batch = batch._replace(kept=[] if any(ctx.needs_input_grad) else None)
        # Do not let autograd save tensors, because the backward of one output would free those of the others.
        ctx.tables, ctx.batch, ctx.weights = tables, batch, list(weights)
        ctx.versions = [w._version for w in weights]
        out = kernels_on(weights[0].device).forward(tables, list(weights), batch)
        # Return no views, because autograd lets nobody change one of several views in place.
        return tuple(piece.data for piece in _pieces(out, _shapes(tables, batch)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *out_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if [w._version for w in ctx.weights] != ctx.versions:
            raise RuntimeError(
                f"a weight of tables {list(ctx.tables.names)} was changed in place between the forward and the "
                "backward; allowed: a change after all backwards of the forward"
            )
        outcomes = _outcomes(ctx.tables, out_gradients, ctx.needs_input_grad[2:])
        # Join no gradients on a CPU, because the copy takes as long as half of the step.
        backward = _backward_by_tables if ctx.weights[0].device.type == "cpu" else _backward
        return None, None, *backward(ctx.tables, ctx.weights, ctx.batch, list(out_gradients), outcomes)


def _outcomes(tables: Description, out_gradients: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    first, of_weights = 0, iter(needed)
    for table in tables.tables:
        of_features = out_gradients[first : first + table.num_features]
        first += table.num_features
        has_gradient = any(gradient is not None for gradient in of_features)
        outcomes += [DenseGradient() if next(of_weights) and has_gradient else None for _ in table.partitions]
    return outcomes


def _backward(
    tables: Description,
    weights: list[Tensor],
    batch: Batch,
    out_gradients: list[Tensor | None],
    outcomes: list[Outcome],
) -> list[Tensor | None]:
    device = weights[0].device
    joined = _joined(out_gradients, _shapes(tables, batch), device)
    return kernels_on(device).backward(tables, weights, batch, joined, outcomes, False).weights


def _backward_by_tables(
    tables: Description,
    weights: list[Tensor],
    batch: Batch,
    out_gradients: list[Tensor | None],
    outcomes: list[Outcome],
) -> list[Tensor | None]:
    assert batch.starts is not None
    found: list[Tensor | None] = []
    first = 0
    for table in tables.alone:
        features, own = slice(first, first + table.num_features), slice(len(found), len(found) + len(table.partitions))
        first = features.stop
        if all(outcome is None for outcome in outcomes[own]):
            found += [None] * len(table.partitions)
            continue
        begin, *ends = batch.starts[features.start : features.stop + 1]
        starts = [0, *(end - begin for end in ends)]
        of_table = Batch(batch.ids[begin : ends[-1]], torch.tensor(starts), None, False, starts)
        found += _backward(table, weights[own], of_table, out_gradients[features], outcomes[own])
    return found


def _joined(gradients: list[Tensor | None], shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Returns the gradients of consecutive features end to end, flat."""
    given = [
        torch.zeros((), device=device).expand(shape) if gradient is None else gradient
        for gradient, shape in zip(gradients, shapes, strict=True)
    ]
    if len({columns for _, columns in shapes}) > 1:
        given = [gradient.reshape(-1) for gradient in given]
    joined = given[0] if len(given) == 1 else torch.cat(given)
    return joined.reshape(-1)
