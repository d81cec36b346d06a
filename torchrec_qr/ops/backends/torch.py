"""The lookup in PyTorch: for ``path``, many partitions, other types and other devices; the kernels' reference."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_qr.ops.arguments import Batch, Gradients, Outcome
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.dispatch import update_rows
from torchrec_qr.ops.path import apply_class_mlps
from torchrec_qr.ops.read_rows import RowReads, Rows, read_rows
from torchrec_qr.ops.update_rules import Update


def forward(tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
    """Returns (B, ΣD) fp32 if pooled, else the (N, D) of each table end to end, flat; autograd differentiates it.

    Only a batch with ``kept`` is differentiated by `backward`: there the graph is kept, and what is returned is no part
    of it.

    Example:
        >>> from torchrec_qr.ops.description import PartitionLayout
        >>> tables = Description([TableLayout("mult", (PartitionLayout(1, 1, 2), PartitionLayout(1, 2, 2)))], ["t"])
        >>> weights = [torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [20.0]])]
        >>> forward(tables, weights, Batch(torch.tensor([0, 3, 1]), torch.tensor([0, 2, 2, 3]), None, True))
        tensor([[70.],
                [ 0.],
                [30.]])
    """
    if batch.kept is None:
        return _joined(look_up_features(tables, list(weights), batch), batch)
    graph = _Graph(tables, weights, batch)
    batch.kept.append(graph)
    return graph.out.detach()


def backward(
    tables: Description,
    weights: list[Tensor],
    batch: Batch,
    out_gradient: Tensor,
    outcomes: list[Outcome],
    id_weights_need_gradient: bool,
) -> Gradients:
    """Steps rows in place, and returns the gradients that are needed; sums and steps are in fp32."""
    # A second backward of one forward looks up anew, as autograd frees the graph of the first.
    graph = batch.kept.pop() if batch.kept else _Graph(tables, weights, batch)
    assert isinstance(graph, _Graph)
    graph.differentiate(out_gradient, outcomes, id_weights_need_gradient)
    with torch.no_grad():
        return Gradients(
            [_finish(reads, outcome) for reads, outcome in zip(graph.reads, outcomes, strict=True)], graph.of_ids
        )


class _Graph:
    """A forward whose rows, and weights of ids, are leaves: gradients are those of rows that were looked up alone."""

    def __init__(self, tables: Description, weights: list[Tensor], batch: Batch) -> None:
        self.reads = [RowReads(w) for w in weights]
        self.of_ids: Tensor | None = None
        self._id_weights = None if batch.weights is None else batch.weights.detach().requires_grad_()
        with torch.enable_grad():
            outputs = look_up_features(tables, list(self.reads), batch._replace(weights=self._id_weights))
            self.out = _joined(outputs, batch)

    def differentiate(self, out_gradient: Tensor, outcomes: list[Outcome], id_weights_need_gradient: bool) -> None:
        """Leaves the gradients of rows in ``reads``, and that of the ids' weights in ``of_ids``."""
        needed = [reads for reads, outcome in zip(self.reads, outcomes, strict=True) if outcome is not None]
        leaves = [leaf for reads in needed for leaf in reads.leaves]
        wanted = [*leaves, self._id_weights] if id_weights_need_gradient and self._id_weights is not None else leaves
        if not wanted:
            return
        gradients = list(torch.autograd.grad(self.out, wanted, out_gradient, allow_unused=True, materialize_grads=True))
        if len(wanted) > len(leaves):
            self.of_ids = gradients.pop()
        remaining = iter(gradients)
        for reads in needed:
            reads.gradients = [next(remaining) for _ in reads.leaves]


def _finish(reads: RowReads, outcome: Outcome) -> Tensor | None:
    if outcome is None:
        return None
    if isinstance(outcome, Update):
        if reads.rows:
            update_rows(reads.weight, *reads.summed(), outcome)
        return None
    if outcome.touched is not None:
        for rows in reads.rows:
            outcome.touched.index_fill_(0, rows, 1)
    return reads.dense()


def look_up_features(tables: Description, weights: list[Any], batch: Batch) -> list[Tensor]:
    """Returns (B, D) fp32 of each feature if pooled, else (N, D), of weights that are tensors or `RowReads`."""
    outputs, remaining = [], iter(weights)
    features = _Features(tables, batch)
    for table, class_map in zip(tables.tables, tables.maps_of_tables(), strict=True):
        own: list[Rows] = [next(remaining) for _ in table.partitions]
        for _ in range(table.num_features):
            ids, bags, id_weights = features.next()
            ids = table.ids_of(ids)
            rows = [p.rows_of(ids, class_map) for p in table.partitions]
            if batch.pooled:
                outputs.append(_pooled_composition(table, own, rows, bags, id_weights))
            else:
                outputs.append(_composed(table, own, rows))
    return outputs


def _joined(outputs: list[Tensor], batch: Batch) -> Tensor:
    if not batch.pooled:
        outputs = [out.reshape(-1) for out in outputs]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1 if batch.pooled else 0)


class _Features:
    """A batch, feature by feature: ids (N,), offsets of bags (B + 1,) from 0, and weights (N,) or None."""

    def __init__(self, tables: Description, batch: Batch) -> None:
        self._batch, self._count, self._number = batch, tables.num_features, 0
        if self._count == 1:
            return
        self._bags = (batch.offsets.numel() - 1) // self._count if batch.pooled else 1
        starts = batch.offsets[:: self._bags].tolist() if batch.starts is None and self._bags else batch.starts
        self._spans = list(pairwise(starts or [0] * (self._count + 1)))

    def next(self) -> tuple[Tensor, Tensor, Tensor | None]:
        ids, offsets, weights = self._batch.ids, self._batch.offsets, self._batch.weights
        if self._count == 1:
            return ids, offsets, weights
        first, span = self._number * self._bags, slice(*self._spans[self._number])
        self._number += 1
        bags = offsets[first : first + self._bags + 1] if self._batch.pooled else offsets
        bags = bags - span.start if span.start and self._batch.pooled else bags
        return ids[span], bags, None if weights is None else weights[span]


def _composed(table: TableLayout, weights: list[Rows], rows: list[Tensor]) -> Tensor:
    """Returns (N, D) fp32: e_n = compose_j(W_j[rows_j[n]])."""
    if table.operation == "path":
        x = read_rows(weights[0], rows[0])
        for mlps, classes in zip(weights[1:], rows[1:], strict=True):
            x = apply_class_mlps(x, mlps, classes, table.path_hidden, table.path_activation)
        return x
    return combined(table.operation, [read_rows(w, r) for w, r in zip(weights, rows, strict=True)])


def _pooled_composition(
    table: TableLayout, weights: list[Rows], rows: list[Tensor], offsets: Tensor, id_weights: Tensor | None
) -> Tensor:
    """Returns (B, D) fp32: out_b = Σ_{n in bag b} w_n · e_n: composed, weighted, then summed.

    ``add``, ``concat`` and ``plain`` commute with the sum: K pooled lookups, with no tensor of N rows. ``mult`` and
    ``path`` do not (pooling first is the error of the reference implementation, dlrm#366).
    """
    if table.operation in ("add", "concat", "plain"):
        pooled = [_sum_rows(w, r, offsets, id_weights) for w, r in zip(weights, rows, strict=True)]
        return combined(table.operation, pooled)
    return _sum_bags(_composed(table, weights, rows), offsets, id_weights)


def _sum_rows(weight: Rows, rows: Tensor, offsets: Tensor, id_weights: Tensor | None) -> Tensor:
    """Returns (B, D) fp32: Σ_{n in bag b} w_n · W[rows_n], with weights of ids, sums and gradients in fp32."""
    if isinstance(weight, Tensor) and weight.dtype == torch.float32:
        return _embedding_bag(weight, rows, offsets, id_weights)
    return _sum_bags(read_rows(weight, rows), offsets, id_weights)


def _sum_bags(values: Tensor, offsets: Tensor, id_weights: Tensor | None) -> Tensor:
    """Returns (B, D): Σ_{n in bag b} w_n · values_n, of values in fp32."""
    return _embedding_bag(values, torch.arange(values.shape[0], device=values.device), offsets, id_weights)


def _embedding_bag(weight: Tensor, rows: Tensor, offsets: Tensor, id_weights: Tensor | None) -> Tensor:
    if id_weights is not None:
        id_weights = id_weights.to(weight.dtype)
    return F.embedding_bag(rows, weight, offsets, mode="sum", include_last_offset=True, per_sample_weights=id_weights)


def combined(operation: str, parts: list[Tensor]) -> Tensor:
    """Returns (N, D): the rows of each partition (N, D_j), composed by any operation but ``path``."""
    if operation == "concat":
        return torch.cat(parts, dim=1)
    out = parts[0]
    for part in parts[1:]:
        out = out * part if operation == "mult" else out + part
    return out
