"""The arguments of every backend: a batch, what becomes of each weight's gradient, and checks that these fit."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_qr.id_hash import hash_offset
from torchrec_qr.ops.description import MAX_WIDTH, CodeLayout, Description
from torchrec_qr.ops.update_rules import Update

_INTEGERS = (torch.int32, torch.int64)
_HOST = torch.device("cpu")


class Batch(NamedTuple):
    """What is looked up, feature after feature.

    Args:
        ids: (N,) int32 or int64.
        offsets: int32 or int64, of bags (F·B + 1,) if ``pooled``, else of features (F + 1,).
        weights: (N,) w_x, or None for 1.
        pooled: whether ids are pooled.
        starts: (F + 1,) where the ids of each feature begin, and N, if the host has these numbers.
        kept: what a forward keeps for the backward of its batch; None: no backward will follow.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    pooled: bool
    starts: Sequence[int] | None = None
    kept: list[Any] | None = None


class SentFeature(NamedTuple):
    """A feature whose ids are sent to other ranks.

    Args:
        num_ids: S.
        out_of_range: the policy for ids outside [0, S), as in `torchrec_qr.ids`.
        code: the row codes that are sent in place of ids, of first row 0; None: ids are sent.
        class_map: (S,) int32 or int64, the base row of each id, if the code has no closed form.
        hash_seed: of the hash that brings any given ids into [0, S), where the policy is "unchecked"; None: no hash.
    """

    num_ids: int
    out_of_range: str
    code: CodeLayout | None = None
    class_map: Tensor | None = None
    hash_seed: int | None = None

    @property
    def hash_offset(self) -> int:
        """As `torchrec_qr.ops.description.TableLayout.hash_offset`."""
        return 0 if self.hash_seed is None else hash_offset(self.hash_seed)


class DenseGradient(NamedTuple):
    """The gradient of a weight is returned for all of its rows, (R_j, D_j).

    ``touched``: (R_j,) uint8, set to 1 where a row was looked up, or None.
    """

    touched: Tensor | None = None


# A weight's gradient steps the rows in place, or is returned; None: nobody needs it.
Outcome = Update | DenseGradient | None


class Replica(NamedTuple):
    """A replica and its step.

    Args:
        weight: (R_j, D_j).
        gradient: (R_j, D_j) fp32, of all ranks.
        update: the step.
        looked_up: (R_j,) uint8, not 0 where a rank has looked up a row; None: rows whose gradient is not 0 are stepped.
        mask: (R_j,) uint8, where this rank's lookups are marked, which the step clears; None if ``looked_up`` is.
    """

    weight: Tensor
    gradient: Tensor
    update: Update
    looked_up: Tensor | None = None
    mask: Tensor | None = None


class Gradients(NamedTuple):
    """What a backward returns: the gradient of each weight that has a `DenseGradient`, and that of the batch's weights,
    (N,) fp32, if it is needed; else None."""

    weights: list[Tensor | None]
    id_weights: Tensor | None


def check_call(tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
    """Checks what kernels cannot see: shapes, strides and types of tensors, whose addresses they take.

    Returns:
        The offsets of the batch.

    Raises:
        ValueError: tensors whose number, shape or stride does not fit the description.
        TypeError: ids or offsets that are no integers.
    """
    if len(weights) != len(tables.partitions):
        raise ValueError(f"{len(weights)} weights; allowed: one per partition, {len(tables.partitions)}")
    for w, p in zip(weights, tables.partitions, strict=True):
        shape, strides = w.shape, w.stride()
        if len(shape) != 2 or shape[1] != p.width or (strides[1] != 1 and shape[1] > 1 and shape[0]):
            raise ValueError(
                f"a weight of shape {tuple(shape)}, strides {strides}; allowed: rows of {p.width} contiguous columns"
            )
        if strides[0] < shape[1]:
            _check_rows_apart("weight", w)
    offsets = _offsets_of(batch)
    _check_devices(tables, weights, batch, offsets)
    if len(tables.mapped) != len(tables.class_maps):
        raise ValueError(
            f"{len(tables.class_maps)} class maps; allowed: one per table with explicit partitions, "
            f"{len(tables.mapped)}"
        )
    for t, class_map in zip(tables.mapped, tables.class_maps, strict=True):
        last = max(p.map_row for p in t.partitions)
        if class_map.dim() != 2 or class_map.shape[1] != t.num_ids or last >= class_map.shape[0]:
            raise ValueError(f"a class map of shape {tuple(class_map.shape)}; allowed: (K, {t.num_ids})")
        if class_map.dtype not in _INTEGERS or class_map.stride(1) != 1:
            raise ValueError(f"a class map of {class_map.dtype}, strides {class_map.stride()}; allowed: contiguous ids")
        _check_rows_apart("class map", class_map)
    return check_batch(tables, batch, weights[0].device)


def check_batch(tables: Description, batch: Batch, device: torch.device) -> Tensor:
    """As `check_call`, of weights that have been checked: those of ``tables`` on ``device``."""
    offsets = _offsets_of(batch)
    on_device = batch.ids.device == device and offsets.device in (device, _HOST)
    if not on_device or (batch.weights is not None and batch.weights.device != device):
        _check_devices(tables, [torch.empty(0, device=device)], batch, offsets)
    if batch.ids.dtype not in _INTEGERS or offsets.dtype not in _INTEGERS:
        raise TypeError(f"ids and offsets of {batch.ids.dtype}, {offsets.dtype}; allowed: torch.int32, torch.int64")
    num_offsets, num_features = offsets.numel() - 1, tables.num_features
    if num_offsets % max(num_features, 1) if batch.pooled else num_offsets != num_features:
        raise ValueError(f"{num_offsets + 1} offsets for {num_features} features; allowed: one per bag, and one")
    if batch.weights is not None and batch.weights.shape != batch.ids.shape:
        raise ValueError(f"{batch.weights.numel()} weights for {batch.ids.numel()} ids; allowed: one per id")
    return offsets


def _offsets_of(batch: Batch) -> Tensor:
    ids, offsets = batch.ids, batch.offsets
    if ids.dim() != 1 or offsets.dim() != 1 or not offsets.numel():
        raise ValueError(
            f"ids and offsets of shapes {tuple(ids.shape)}, {tuple(offsets.shape)}; allowed: (N,) and (bags + 1,)"
        )
    return offsets


def rows_overlap(matrix: Tensor) -> bool:
    """Returns whether rows of a matrix, each contiguous, share memory, as those of an expanded one do.

    Example:
        >>> rows_overlap(torch.ones(1, 4).expand(3, 4)), rows_overlap(torch.ones(3, 4))
        (True, False)
    """
    rows, columns = matrix.shape
    return rows > 1 and (columns == 1 or matrix.stride(1) == 1) and matrix.stride(0) < columns


def rows_apart(weights: list[Tensor]) -> list[Tensor]:
    """Returns weights whose rows do not overlap, because kernels go from row to row by a stride of at least a row.

    Autograd leads the gradient of a copy back.
    """
    return [w.contiguous() if rows_overlap(w) else w for w in weights]


def _check_rows_apart(what: str, matrix: Tensor) -> None:
    """Raises a ValueError if rows of ``matrix`` overlap: kernels would read past its end, or step rows twice."""
    if rows_overlap(matrix):
        raise ValueError(
            f"a {what} of shape {tuple(matrix.shape)}, strides {matrix.stride()}, whose rows overlap; allowed: rows "
            f"that are {matrix.shape[1]} or more apart, as those of a copy (contiguous())"
        )


def _check_devices(tables: Description, weights: list[Tensor], batch: Batch, offsets: Tensor) -> None:
    """Kernels get addresses, and one of another device is memory that is not theirs. Offsets may lie on the host."""
    device = weights[0].device
    wrong = [f"ids on {batch.ids.device}"] * (batch.ids.device != device)
    wrong += [f"offsets on {offsets.device}"] * (offsets.device not in (device, _HOST))
    if batch.weights is not None and batch.weights.device != device:
        wrong.append(f"weights of ids on {batch.weights.device}")
    if any(w.device != device for w in weights) or any(m.device != device for m in tables.class_maps):
        of_weights, of_maps = iter(weights), iter(tables.class_maps)
        for table, name in zip(tables.tables, tables.names, strict=True):
            own = [("partition", next(of_weights)) for _ in table.partitions]
            own += [("class map", next(of_maps))] * table.has_map
            wrong += [f"a {what} of table {name!r} on {t.device}" for what, t in own if t.device != device]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}; allowed: {device}, where partition 0 of table {tables.names[0]!r} lies")


def check_out_gradient(out_gradient: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises a ValueError if a gradient has another shape than the output, or lies on another device."""
    if tuple(out_gradient.shape) != shape or out_gradient.device != device:
        raise ValueError(
            f"a gradient of shape {tuple(out_gradient.shape)} on {out_gradient.device}; allowed: {shape} on {device}, "
            "the output's"
        )


def check_step(weight: Tensor, rows: Tensor, gradients: Tensor) -> None:
    """Raises a ValueError if ``rows`` (n,) of ``weight`` (R_j, D_j) cannot be stepped by ``gradients`` (n, D_j)."""
    if weight.dim() != 2 or not 0 < weight.shape[1] <= MAX_WIDTH or weight.stride(1) != 1:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}, strides {weight.stride()}; allowed: rows of up to {MAX_WIDTH} "
            "contiguous columns"
        )
    _check_rows_apart("weight", weight)
    expected = (rows.numel(), weight.shape[1])
    if rows.dtype != torch.int64 or rows.dim() != 1 or tuple(gradients.shape) != expected:
        raise ValueError(
            f"rows {rows.dtype} {tuple(rows.shape)} with gradients {tuple(gradients.shape)}; allowed: (n,) torch.int64 "
            f"with (n, {weight.shape[1]})"
        )
    if rows.device != weight.device or gradients.device != weight.device:
        raise ValueError(
            f"rows on {rows.device} with gradients on {gradients.device}; allowed: {weight.device}, as the weight"
        )


def check_replica(replica: Replica) -> None:
    """Raises a ValueError if the tensors of a replica do not fit its weight."""
    weight, gradient = replica.weight, replica.gradient
    check_state(replica.update, weight)
    _check_rows_apart("weight", weight)
    fits = gradient.dtype == torch.float32 and gradient.is_contiguous() and gradient.device == weight.device
    if gradient.shape != weight.shape or not fits:
        raise ValueError(
            f"a gradient of shape {tuple(gradient.shape)}, {gradient.dtype} on {gradient.device}; allowed: contiguous, "
            f"{tuple(weight.shape)}, torch.float32 on {weight.device}, as the replica"
        )
    for mask in (replica.looked_up, replica.mask):
        if (mask is not None) != replica.update.rule.moves_without_gradient:
            rule = type(replica.update.rule).__name__
            raise ValueError(f"{rule} with mask {mask}; allowed: two if it moves rows without a gradient")
        if mask is not None:
            _check_touched(mask, weight)


def check_outcome(outcome: Outcome, weight: Tensor) -> None:
    """Raises a ValueError if the state or the mask of an outcome does not fit ``weight`` (R_j, D_j)."""
    if isinstance(outcome, Update):
        check_state(outcome, weight)
    elif outcome is not None and outcome.touched is not None:
        _check_touched(outcome.touched, weight)


def check_state(update: Update, weight: Tensor) -> None:
    """Raises a ValueError if a state of ``update`` is none of ``weight`` (R_j, D_j)."""
    for state, shape in zip(update.state.values(), update.rule.state_shapes(*weight.shape).values(), strict=True):
        fits = state.shape == shape and state.dtype == torch.float32 and state.is_contiguous()
        if not fits or state.device != weight.device:
            raise ValueError(
                f"state of shape {tuple(state.shape)}, {state.dtype} on {state.device}; allowed: contiguous, "
                f"{shape}, torch.float32 on {weight.device}"
            )


def _check_touched(touched: Tensor, weight: Tensor) -> None:
    rows = tuple(weight.shape[:1])
    fits = touched.shape == rows and touched.dtype == torch.uint8 and touched.is_contiguous()
    if not fits or touched.device != weight.device:
        raise ValueError(
            f"touched of shape {tuple(touched.shape)}, {touched.dtype} on {touched.device}; allowed: contiguous, "
            f"{rows}, torch.uint8 on {weight.device}"
        )
