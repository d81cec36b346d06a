"""What the kernels of every backend are asked: a batch, what becomes of gradients, and whether these fit the tables."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_qr.ops.cpu_structs import MAX_STATES, MAX_WIDTH, Plan

# By their numbers in csrc/lookup.h. GRADIENT: the row's gradient is returned; NOTHING: it is not needed.
RULES = {"sgd": 1, "adagrad": 2, "rowwise_adagrad": 3, "adam": 4, "amsgrad": 5}
GRADIENT, NOTHING = 0, -1
_NUM_STATES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2, "amsgrad": MAX_STATES}


class Batch(NamedTuple):
    """What is looked up, feature after feature.

    ids (N,) int32 or int64; offsets int32 or int64, of bags (F·B + 1,) if ``pooled``, else of features (F + 1,);
    weights (N,) or None.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    pooled: bool


class Gradients(NamedTuple):
    """Per weight: what becomes of its rows' gradients.

    ``rules``: GRADIENT, NOTHING, or one of RULES, with (R_j, D_j) or (R_j,) fp32 ``states`` of the weights that are
    stepped, all end to end, and 7 numbers per weight in ``hyper`` (``cpu_structs.HYPER``). ``touched``: per weight
    (R_j,) uint8, set to 1 where a row was looked up, or empty.
    """

    rules: list[int]
    states: list[Tensor]
    hyper: list[float]
    touched: list[Tensor]


def num_states(rule: int) -> int:
    """Returns how many tensors of state a rule keeps per weight."""
    return next((_NUM_STATES[name] for name, number in RULES.items() if number == rule), 0)


def check_call(plan: Plan, weights: list[Tensor], class_maps: list[Tensor], batch: Batch, names: str) -> None:
    """Checks what kernels cannot see: shapes, strides and types of tensors, of which they are given addresses.

    Raises:
        ValueError: tensors whose number, shape or stride does not fit the plan; names that are not one per table.
        TypeError: ids or offsets that are no integers.
    """
    if len(weights) != len(plan.partitions):
        raise ValueError(f"{len(weights)} weights; allowed: one per partition, {len(plan.partitions)}")
    if names.count("\n") + 1 != len(plan.layouts):
        raise ValueError(f"names of tables {names!r}; allowed: one per table, {len(plan.layouts)}")
    for w, width in zip(weights, plan.widths, strict=True):
        if w.dim() != 2 or w.shape[1] != width or (w.stride(1) != 1 and w.shape[1] > 1 and w.numel()):
            raise ValueError(
                f"a weight of shape {tuple(w.shape)}, strides {w.stride()}; allowed: rows of {width} contiguous columns"
            )
        _check_rows_apart("weight", w)
    if batch.ids.dim() != 1 or batch.offsets.dim() != 1 or not batch.offsets.numel():
        raise ValueError(
            f"ids and offsets of shapes {tuple(batch.ids.shape)}, {tuple(batch.offsets.shape)}; allowed: (N,) and "
            "(bags + 1,)"
        )
    _check_devices(plan, weights, class_maps, batch, names)
    integers = (torch.int32, torch.int64)
    if batch.ids.dtype not in integers or batch.offsets.dtype not in integers:
        raise TypeError(
            f"ids and offsets of {batch.ids.dtype}, {batch.offsets.dtype}; allowed: torch.int32, torch.int64"
        )
    num_offsets = batch.offsets.numel() - 1
    if num_offsets % max(plan.num_features, 1) if batch.pooled else num_offsets != plan.num_features:
        raise ValueError(f"{num_offsets + 1} offsets for {plan.num_features} features; allowed: one per bag, and one")
    if batch.weights is not None and batch.weights.shape != batch.ids.shape:
        raise ValueError(f"{batch.weights.numel()} weights for {batch.ids.numel()} ids; allowed: one per id")
    mapped = [t for t in plan.layouts if t.has_map]
    if len(mapped) != len(class_maps):
        raise ValueError(
            f"{len(class_maps)} class maps; allowed: one per table with explicit partitions, {len(mapped)}"
        )
    for t, class_map in zip(mapped, class_maps, strict=True):
        last = max(p.map_row for p in t.partitions)
        if class_map.dim() != 2 or class_map.shape[1] != t.num_ids or last >= class_map.shape[0]:
            raise ValueError(f"a class map of shape {tuple(class_map.shape)}; allowed: (K, {t.num_ids})")
        if class_map.dtype not in integers or class_map.stride(1) != 1:
            raise ValueError(f"a class map of {class_map.dtype}, strides {class_map.stride()}; allowed: contiguous ids")
        _check_rows_apart("class map", class_map)


def rows_overlap(matrix: Tensor) -> bool:
    """Returns whether rows of a matrix, each contiguous, share memory, as those of an expanded one do.

    Example:
        >>> rows_overlap(torch.ones(1, 4).expand(3, 4)), rows_overlap(torch.ones(3, 4))
        (True, False)
    """
    rows, columns = matrix.shape
    return rows > 1 and (columns == 1 or matrix.stride(1) == 1) and matrix.stride(0) < columns


def _check_rows_apart(what: str, matrix: Tensor) -> None:
    """Raises a ValueError where rows of ``matrix`` overlap: kernels would read past its end, or step rows twice."""
    if rows_overlap(matrix):
        raise ValueError(
            f"a {what} of shape {tuple(matrix.shape)}, strides {matrix.stride()}, whose rows overlap; allowed: rows "
            f"that are {matrix.shape[1]} or more apart, as those of a copy (contiguous())"
        )


def _check_devices(plan: Plan, weights: list[Tensor], class_maps: list[Tensor], batch: Batch, names: str) -> None:
    """Kernels get addresses, and one of another device is memory that is not theirs. Offsets may lie on the host."""
    device = weights[0].device
    host = {torch.device("cpu"), device}
    wrong = [f"ids on {batch.ids.device}"] * (batch.ids.device != device)
    wrong += [f"offsets on {batch.offsets.device}"] * (batch.offsets.device not in host)
    if batch.weights is not None and batch.weights.device != device:
        wrong.append(f"weights of ids on {batch.weights.device}")
    if any(w.device != device for w in weights) or any(m.device != device for m in class_maps):
        of_weights, of_maps = iter(weights), iter(class_maps)
        for table, name in zip(plan.layouts, names.split("\n"), strict=True):
            own = [("partition", next(of_weights)) for _ in table.partitions]
            own += [("class map", next(of_maps))] * table.has_map
            wrong += [f"a {what} of table {name!r} on {t.device}" for what, t in own if t.device != device]
    if wrong:
        first = names.split("\n")[0]
        raise ValueError(f"{', '.join(wrong)}; allowed: {device}, where partition 0 of table {first!r} lies")


def check_out_gradient(out_gradient: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises a ValueError where a gradient has another shape than the output, or lies on another device."""
    if tuple(out_gradient.shape) != shape or out_gradient.device != device:
        raise ValueError(
            f"a gradient of shape {tuple(out_gradient.shape)} on {out_gradient.device}; allowed: {shape} on {device}, "
            "the output's"
        )


def check_step(weight: Tensor, rows: Tensor, gradients: Tensor) -> None:
    """Raises a ValueError where ``rows`` (n,) of ``weight`` (R_j, D_j) cannot be stepped by ``gradients`` (n, D_j)."""
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


def check_state(state: Tensor, weight: Tensor, rule: int) -> None:
    """Raises a ValueError where ``state`` is none of ``weight`` (R_j, D_j) under ``rule``."""
    shape = weight.shape[:1] if rule == RULES["rowwise_adagrad"] else weight.shape
    fits = state.shape == shape and state.dtype == torch.float32 and state.is_contiguous()
    if not fits or state.device != weight.device:
        raise ValueError(
            f"state of shape {tuple(state.shape)}, {state.dtype} on {state.device}; allowed: contiguous, "
            f"{tuple(shape)}, torch.float32 on {weight.device}"
        )


def check_touched(touched: Tensor, weight: Tensor) -> None:
    """Raises a ValueError where ``touched`` is neither empty nor a mask of the rows of ``weight`` (R_j, D_j)."""
    rows = tuple(weight.shape[:1])
    if not touched.numel():
        return
    fits = touched.shape == rows and touched.dtype == torch.uint8 and touched.is_contiguous()
    if not fits or touched.device != weight.device:
        raise ValueError(
            f"touched of shape {tuple(touched.shape)}, {touched.dtype} on {touched.device}; allowed: contiguous, "
            f"{rows}, torch.uint8 on {weight.device}"
        )
