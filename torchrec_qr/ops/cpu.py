"""Calls of the CPU kernels: tensors in, tensors out, failures as exceptions."""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.cpu_structs import (
    FAILURE,
    GROUP,
    HYPER,
    MAX_PARTITIONS,
    MAX_STATES,
    MAX_WIDTH,
    PARTITION,
    STRUCTS,
    TYPES,
    Plan,
    partitions_with,
    plan_of,
)
from torchrec_qr.ops.layout import OPERATIONS
from torchrec_qr.ops.memory import recycled

# By their numbers in csrc/lookup.h. GRADIENT: the row's gradient is returned; NOTHING: it is not needed.
RULES = {"sgd": 1, "adagrad": 2, "rowwise_adagrad": 3, "adam": 4, "amsgrad": 5}
GRADIENT, NOTHING = 0, -1


class Batch(NamedTuple):
    """What is looked up, feature after feature.

    ids (N,) int32 or int64; offsets int32 or int64, of bags (F·B + 1,) if ``pooled``, else of features (F + 1,);
    weights (N,) or None.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    pooled: bool


def supports(operation: str, widths: Sequence[int]) -> bool:
    """Returns whether the kernels have tables with such partitions."""
    return operation in OPERATIONS and 0 < len(widths) <= MAX_PARTITIONS and max(widths) <= MAX_WIDTH


@torch.compiler.assume_constant_result
def available() -> bool:
    """Returns whether the kernels look tables up on the CPU; see `torchrec_qr.ops.cpu_library`."""
    return _library() is not None


def look_up(weights: list[Tensor], class_maps: list[Tensor], batch: Batch, layout: list[int], names: str) -> Tensor:
    """Returns (B, ΣD) if pooled, else the (N, D) of each table end to end, flat."""
    plan = plan_of(tuple(layout))
    call = _Call(plan, weights, class_maps, batch, names)
    out = recycled(call.out_shape, torch.float32)
    call.group["out"] = out.data_ptr()
    call.run("qr_forward")
    return out


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


def propagate(
    out_gradient: Tensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    batch: Batch,
    layout: list[int],
    names: str,
    gradients: Gradients,
    weights_need_gradient: bool,
) -> list[Tensor]:
    """Steps rows in place, and returns a gradient per weight and that of the batch's weights; empty where not asked."""
    call = _Call(plan_of(tuple(layout)), weights, class_maps, batch, names)
    if tuple(out_gradient.shape) != call.out_shape:
        raise ValueError(f"a gradient of shape {tuple(out_gradient.shape)}; allowed: {call.out_shape}, the output's")
    out_gradient = out_gradient.to(torch.float32).contiguous()
    dense = [
        torch.zeros(w.shape) if rule == GRADIENT else torch.empty(0)
        for w, rule in zip(weights, gradients.rules, strict=True)
    ]
    p = call.partitions
    p["gradient"] = [d.data_ptr() if rule == GRADIENT else 0 for d, rule in zip(dense, gradients.rules, strict=True)]
    p["rule"] = [max(rule, 0) for rule in gradients.rules]
    if gradients.touched:
        p["touched"] = [_mask_address(t, w) for t, w in zip(gradients.touched, weights, strict=True)]
    if gradients.hyper:
        hyper = np.asarray(gradients.hyper, np.float32).reshape(len(weights), len(HYPER))
        for i, name in enumerate(HYPER):
            p[name] = hyper[:, i]
    states = iter(gradients.states)
    for i, rule in enumerate(gradients.rules):
        for s in range(num_states(rule)):
            p["state"][i, s] = _state_address(next(states), weights[i], rule)
    of_weights = torch.zeros(batch.ids.shape) if weights_need_gradient else torch.empty(0)
    call.group["out_gradient"] = out_gradient.data_ptr()
    call.group["id_weights_gradient"] = of_weights.data_ptr() if weights_need_gradient else 0
    call.run("qr_backward")
    return [*(d.to(w.dtype) for d, w in zip(dense, weights, strict=True)), of_weights]


def step_rows(
    weight: Tensor, rows: Tensor, gradients: Tensor, rule: str, states: list[Tensor], hyper: Sequence[float]
) -> None:
    """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, D_j)."""
    rows, gradients = rows.contiguous(), gradients.to(torch.float32).contiguous()
    if rows.dtype != torch.int64 or gradients.shape != (rows.numel(), weight.shape[1]) or weight.stride(1) != 1:
        raise ValueError(
            f"rows {rows.dtype} {tuple(rows.shape)} with gradients {tuple(gradients.shape)} of a weight of shape "
            f"{tuple(weight.shape)}, strides {weight.stride()}; allowed: (n,) torch.int64, (n, {weight.shape[1]}), rows"
        )
    p = np.zeros(1, PARTITION)
    p["weight"], p["rows"], p["width"] = weight.data_ptr(), weight.shape[0], weight.shape[1]
    p["row_stride"], p["weight_type"] = max(weight.stride(0), weight.shape[1]), TYPES[weight.dtype]
    p["rule"] = RULES[rule]
    for i, state in enumerate(states):
        p["state"][0, i] = _state_address(state, weight, RULES[rule])
    for name, value in zip(HYPER, hyper, strict=True):
        p[name] = value
    failure = np.zeros(1, FAILURE)
    library = _library()
    assert library is not None
    if library.qr_step_rows(
        p.ctypes.data, rows.data_ptr(), gradients.data_ptr(), rows.numel(), cpu_library.isa(), failure.ctypes.data
    ):
        raise IndexError(f"row {int(failure[0]['value'])} is out of range [0, {weight.shape[0]})")


def id_bounds(ids: Tensor, starts: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the least and the largest id of each feature, whose ids begin and end at ``starts``; (0, -1): no ids."""
    if ids.dim() != 1 or any(a > b for a, b in pairwise([0, *starts, ids.numel()])):
        raise ValueError(
            f"starts {list(starts)} of {tuple(ids.shape)} ids; allowed: increasing, from 0 to their number"
        )
    ids, first = ids.contiguous(), np.asarray(starts, np.int64)
    bounds = np.empty((len(starts) - 1, 2), np.int64)
    library = _library()
    assert library is not None
    library.qr_id_bounds(
        ids.data_ptr(), TYPES[ids.dtype], first.ctypes.data, len(bounds), cpu_library.isa(), bounds.ctypes.data
    )
    return [(low, high) for low, high in bounds.tolist()]


def num_states(rule: int) -> int:
    """Returns how many tensors of state a rule keeps per weight."""
    return {2: 1, 3: 1, 4: 2, 5: MAX_STATES}.get(rule, 0)


def _state_address(state: Tensor, weight: Tensor, rule: int) -> int:
    shape = weight.shape[:1] if rule == RULES["rowwise_adagrad"] else weight.shape
    if state.shape != shape or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(
            f"state of shape {tuple(state.shape)}, {state.dtype}; allowed: contiguous, {tuple(shape)}, torch.float32"
        )
    return state.data_ptr()


def _mask_address(touched: Tensor, weight: Tensor) -> int:
    if not touched.numel():
        return 0
    rows = tuple(weight.shape[:1])
    if touched.shape != rows or touched.dtype != torch.uint8 or not touched.is_contiguous():
        raise ValueError(
            f"touched of shape {tuple(touched.shape)}, {touched.dtype}; allowed: contiguous, {rows}, torch.uint8"
        )
    return touched.data_ptr()


class _Call:
    """One call of the library: the structs, and what they point to."""

    def __init__(self, plan: Plan, weights: list[Tensor], class_maps: list[Tensor], batch: Batch, names: str) -> None:
        self._plan, self._batch, self._names = plan, batch, names
        _check(plan, weights, class_maps, batch, names)
        self._ids, self._offsets = batch.ids.contiguous(), batch.offsets.contiguous()
        self._weights = None if batch.weights is None else batch.weights.to(torch.float32).contiguous()
        self._class_maps = class_maps
        self.partitions = partitions_with(plan, weights, class_maps)
        num_bags = (batch.offsets.numel() - 1) // max(plan.num_features, 1) if batch.pooled else 0
        self.out_shape = (num_bags, plan.columns) if batch.pooled else (_floats(plan, batch),)
        self.group = np.zeros(1, GROUP)
        self.group[0] = (
            *(plan.tables.ctypes.data, self.partitions.ctypes.data, self._ids.data_ptr(), self._offsets.data_ptr()),
            *(0 if self._weights is None else self._weights.data_ptr(), 0, 0, 0),
            *(len(plan.tables), plan.num_features, batch.ids.numel(), num_bags, plan.columns if batch.pooled else 0),
            *(TYPES[batch.ids.dtype], TYPES[batch.offsets.dtype], batch.pooled),
            *(torch.get_num_threads(), cpu_library.isa()),
        )

    def run(self, function: str) -> None:
        library = _library()
        assert library is not None
        failure = np.zeros(1, FAILURE)
        if getattr(library, function)(self.group.ctypes.data, failure.ctypes.data):
            self._raise(failure[0])

    def _raise(self, failure: np.void) -> None:
        code, position, value = int(failure["code"]), int(failure["position"]), int(failure["value"])
        table = self._names.split("\n")[int(failure["table"])] if failure["table"] >= 0 else ""
        match code:
            case 1:
                num_ids = self._plan.layouts[int(failure["table"])].num_ids
                raise IndexError(f"table {table!r}: id {value} (number {position}) is out of range [0, {num_ids})")
            case 2:
                raise IndexError(
                    f"table {table!r}: id number {position} has row {value} of partition {int(failure['partition'])}, "
                    "which is out of range"
                )
            case 3:
                raise ValueError(f"offsets[{position}] = {value} is less than the offset before it")
            case 4:
                raise ValueError(
                    f"offsets[{position}] = {value}; allowed: offsets from 0 to the number of ids, "
                    f"{self._batch.ids.numel()}"
                )
            case 5:
                raise ValueError(f"table {table!r}: {value} ids are too many for one batch")
            case 6:
                raise MemoryError("no memory for the lookup's buffers")
        raise ValueError(f"table {table!r}: a layout that the kernels refuse (check {position}, value {value})")


def _check(plan: Plan, weights: list[Tensor], class_maps: list[Tensor], batch: Batch, names: str) -> None:
    """What the library cannot see: sizes of tensors, of which it is given addresses."""
    if len(weights) != len(plan.partitions):
        raise ValueError(f"{len(weights)} weights; allowed: one per partition, {len(plan.partitions)}")
    if names.count("\n") + 1 != len(plan.layouts):
        raise ValueError(f"names of tables {names!r}; allowed: one per table, {len(plan.layouts)}")
    for w, width in zip(weights, plan.widths, strict=True):
        if w.dim() != 2 or w.shape[1] != width or (w.stride(1) != 1 and w.shape[1] > 1 and w.numel()):
            raise ValueError(
                f"a weight of shape {tuple(w.shape)}, strides {w.stride()}; allowed: rows of {width} contiguous columns"
            )
    if batch.ids.dim() != 1 or batch.offsets.dim() != 1 or not batch.offsets.numel():
        raise ValueError(
            f"ids and offsets of shapes {tuple(batch.ids.shape)}, {tuple(batch.offsets.shape)}; allowed: (N,) and "
            "(bags + 1,)"
        )
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


def _floats(plan: Plan, batch: Batch) -> int:
    """Floats in the output of a batch that is not pooled."""
    offsets, first = batch.offsets.numpy(), plan.tables["first_feature"]
    ids = offsets[first + plan.tables["num_features"]] - offsets[first]
    # Offsets that are none are found by the library, which then writes nothing.
    return max(int(np.dot(ids.astype(np.int64), plan.tables["dim"])), 0)


def _library() -> ctypes.CDLL | None:
    library = cpu_library.library()
    if library is not None and not getattr(library, "checked", False):
        sizes = np.zeros(len(STRUCTS), np.int64)
        library.qr_struct_sizes(ctypes.c_void_p(sizes.ctypes.data))
        expected = [s.itemsize for s in STRUCTS]
        if sizes.tolist() != expected:
            raise RuntimeError(
                f"the CPU kernels were built for another version of torchrec_qr (structs of {sizes.tolist()} bytes, "
                f"here {expected}): install the package again"
            )
        library.checked = True  # type: ignore[attr-defined]
    return library
