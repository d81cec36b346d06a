"""Calls of the CPU kernels: tensors in, tensors out, failures as exceptions."""

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.arguments import (
    GRADIENT,
    RULES,
    Batch,
    Gradients,
    check_call,
    check_out_gradient,
    check_state,
    check_step,
    check_touched,
    num_states,
)
from torchrec_qr.ops.cpu_structs import (
    FAILURE,
    GROUP,
    HYPER,
    MAX_PARTITIONS,
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
    check_out_gradient(out_gradient, call.out_shape, weights[0].device)
    out_gradient = out_gradient.to(torch.float32).contiguous()
    dense = [
        torch.zeros(w.shape) if rule == GRADIENT else torch.empty(0)
        for w, rule in zip(weights, gradients.rules, strict=True)
    ]
    p = call.partitions
    p["gradient"] = [d.data_ptr() if rule == GRADIENT else 0 for d, rule in zip(dense, gradients.rules, strict=True)]
    p["rule"] = [max(rule, 0) for rule in gradients.rules]
    if gradients.touched:
        for touched, weight in zip(gradients.touched, weights, strict=True):
            check_touched(touched, weight)
        p["touched"] = [t.data_ptr() if t.numel() else 0 for t in gradients.touched]
    if gradients.hyper:
        hyper = np.asarray(gradients.hyper, np.float32).reshape(len(weights), len(HYPER))
        for i, name in enumerate(HYPER):
            p[name] = hyper[:, i]
    states = iter(gradients.states)
    for i, rule in enumerate(gradients.rules):
        for s in range(num_states(rule)):
            state = next(states)
            check_state(state, weights[i], rule)
            p["state"][i, s] = state.data_ptr()
    of_weights = torch.zeros(batch.ids.shape) if weights_need_gradient else torch.empty(0)
    call.group["out_gradient"] = out_gradient.data_ptr()
    call.group["id_weights_gradient"] = of_weights.data_ptr() if weights_need_gradient else 0
    call.run("qr_backward")
    return [*(d.to(w.dtype) for d, w in zip(dense, weights, strict=True)), of_weights]


def step_rows(
    weight: Tensor, rows: Tensor, gradients: Tensor, rule: str, states: list[Tensor], hyper: Sequence[float]
) -> None:
    """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, D_j)."""
    check_step(weight, rows, gradients)
    rows, gradients = rows.contiguous(), gradients.to(torch.float32).contiguous()
    p = np.zeros(1, PARTITION)
    p["weight"], p["rows"], p["width"] = weight.data_ptr(), weight.shape[0], weight.shape[1]
    p["row_stride"], p["weight_type"] = max(weight.stride(0), weight.shape[1]), TYPES[weight.dtype]
    p["rule"] = RULES[rule]
    for i, state in enumerate(states):
        check_state(state, weight, RULES[rule])
        p["state"][0, i] = state.data_ptr()
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


class _Call:
    """One call of the library: the structs, and what they point to."""

    def __init__(self, plan: Plan, weights: list[Tensor], class_maps: list[Tensor], batch: Batch, names: str) -> None:
        self._plan, self._batch, self._names = plan, batch, names
        check_call(plan, weights, class_maps, batch, names)
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
        match code:  # `Code` in csrc/lookup.h
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
