"""The compositional lookup: rows of K partitions → one embedding per id → one per bag."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrec_qr.ops.path import apply_class_mlps
from torchrec_qr.ops.read_rows import RowGradients, read_rows


class Composition(NamedTuple):
    """How the K rows of an id become its embedding; see `CompositionalEmbeddingBagConfig`."""

    operation: str
    path_hidden: int | None = None
    path_activation: str = "relu"


def compositional_embedding(
    composition: Composition,
    weights: list[Tensor],
    rows: list[Tensor],
    stepped: Sequence[RowGradients | None] | None = None,
) -> Tensor:
    """Returns (N, D) fp32: e_n = compose_j(W_j[rows_j[n]]).

    Args:
        composition: ``mult`` Π_j, ``add`` Σ_j, ``concat`` (W_1[…], …, W_K[…]), or ``path``.
        weights: K tensors (|P_j|, D_j), fp32, fp16 or bf16; composed in fp32.
        rows: K tensors (N,) int64, in [0, |P_j|).
        stepped: per weight, what takes the gradients of its rows in place of its dense gradient; default: nothing.

    Example:
        >>> w0, w1 = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 10.0]])
        >>> compositional_embedding(Composition("mult"), [w0, w1], [torch.tensor([1, 0]), torch.tensor([0, 0])])
        tensor([[30., 40.],
                [10., 20.]])
    """
    into = stepped or [None] * len(weights)
    if composition.operation == "path":
        x = read_rows(weights[0], rows[0], into[0])
        for mlps, classes, gradients in zip(weights[1:], rows[1:], into[1:], strict=True):
            x = apply_class_mlps(x, mlps, classes, composition.path_hidden, composition.path_activation, gradients)
        return x
    parts = [read_rows(w, r, gradients) for r, w, gradients in zip(rows, weights, into, strict=True)]
    return _combine(composition.operation, parts)


def compositional_bag(
    composition: Composition,
    weights: list[Tensor],
    rows: list[Tensor],
    offsets: Tensor,
    per_sample_weights: Tensor | None = None,
    stepped: Sequence[RowGradients | None] | None = None,
) -> Tensor:
    """Returns (B, D) fp32: out_b = Σ_{n in bag b} w_n · compose_j(W_j[rows_j[n]]): composed, weighted, then summed.

    ``add`` and ``concat`` commute with the sum: K pooled lookups, with no tensor of N rows. ``mult`` and ``path`` do
    not (pooling first is the error of the reference implementation, dlrm#366).

    Args:
        composition, weights, rows, stepped: as `compositional_embedding`.
        offsets: (B + 1,) int64; bag b holds ids offsets[b] to offsets[b + 1].
        per_sample_weights: (N,) w_n; default 1. Receives a gradient.

    Example:
        >>> w0, w1 = torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [20.0]])
        >>> rows = [torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])]
        >>> compositional_bag(Composition("mult"), [w0, w1], rows, torch.tensor([0, 2, 2, 3]))
        tensor([[70.],
                [ 0.],
                [30.]])
    """
    if composition.operation in ("add", "concat"):
        into = stepped or [None] * len(weights)
        pooled = [
            sum_rows(w, r, offsets, per_sample_weights, gradients)
            for w, r, gradients in zip(weights, rows, into, strict=True)
        ]
        return _combine(composition.operation, pooled)
    composed = compositional_embedding(composition, weights, rows, stepped)
    return sum_bags(composed, offsets, per_sample_weights)


def sum_bags(values: Tensor, offsets: Tensor, per_sample_weights: Tensor | None) -> Tensor:
    """Returns (B, D): Σ_{n in bag b} w_n · values_n, of values in fp32."""
    return _pooled(values, torch.arange(values.shape[0], device=values.device), offsets, per_sample_weights)


def sum_rows(
    weight: Tensor,
    rows: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    into: RowGradients | None = None,
) -> Tensor:
    """Returns (B, D) fp32: Σ_{n in bag b} w_n · W[rows_n], with weights of ids, sums and gradients in fp32."""
    if weight.dtype == torch.float32 and into is None:
        return _pooled(weight, rows, offsets, per_sample_weights)
    return sum_bags(read_rows(weight, rows, into), offsets, per_sample_weights)


def _pooled(weight: Tensor, rows: Tensor, offsets: Tensor, per_sample_weights: Tensor | None) -> Tensor:
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(weight.dtype)
    return F.embedding_bag(
        rows, weight, offsets, mode="sum", include_last_offset=True, per_sample_weights=per_sample_weights
    )


def _combine(operation: str, parts: list[Tensor]) -> Tensor:
    if operation == "concat":
        return torch.cat(parts, dim=1)
    out = parts[0]
    for part in parts[1:]:
        out = out * part if operation == "mult" else out + part
    return out


# They look at shapes or types of their data, so `torch.fx` records them as calls. It traces through everything else.
torch.fx.wrap("apply_class_mlps")
torch.fx.wrap("read_rows")
torch.fx.wrap("sum_bags")
torch.fx.wrap("sum_rows")
