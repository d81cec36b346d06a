"""Calls of the CPU kernels: tensors in, tensors out, failures as exceptions."""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrec_qr.ops import cpu_library
from torchrec_qr.ops.arguments import (
    Batch,
    DenseGradient,
    Gradients,
    Outcome,
    check_call,
    check_out_gradient,
    check_outcome,
    check_state,
    check_step,
)
from torchrec_qr.ops.backends.cpu_structs import (
    FAILURE,
    GROUP,
    MAX_STATES,
    PARTITION,
    STRUCTS,
    TYPES,
    Structs,
    structs_of,
)
from torchrec_qr.ops.description import Description
from torchrec_qr.ops.memory import recycled
from torchrec_qr.ops.update_rules import NUMBERS, Update

_NO_STATES, _NO_NUMBERS = [0] * MAX_STATES, [0.0] * len(NUMBERS)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Returns whether the kernels look tables up on the CPU; see `torchrec_qr.ops.cpu_library`."""
    return _library() is not None


def forward(tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
    """Returns (B, ΣD) if pooled, else the (N, D) of each table end to end, flat."""
    call = _Call(tables, weights, batch)
    out = recycled(call.out_shape, torch.float32)
    call.group["out"] = out.data_ptr()
    call.run("qr_forward")
    return out


def backward(
    tables: Description,
    weights: list[Tensor],
    batch: Batch,
    out_gradient: Tensor,
    outcomes: list[Outcome],
    id_weights_need_gradient: bool,
) -> Gradients:
    """Steps rows in place, and returns the gradients that are needed."""
    call = _Call(tables, weights, batch)
    check_out_gradient(out_gradient, call.out_shape, weights[0].device)
    out_gradient = out_gradient.to(torch.float32).contiguous()
    dense: list[Tensor | None] = []
    for i, (weight, outcome) in enumerate(zip(weights, outcomes, strict=True)):
        check_outcome(outcome, weight)
        gradient = torch.zeros(weight.shape) if isinstance(outcome, DenseGradient) else None
        dense.append(gradient)
        if isinstance(outcome, DenseGradient) and gradient is not None:
            call.partitions["gradient"][i] = gradient.data_ptr()
            call.partitions["touched"][i] = 0 if outcome.touched is None else outcome.touched.data_ptr()
    _write_updates(call.partitions, [o if isinstance(o, Update) else None for o in outcomes])
    of_ids = torch.zeros(batch.ids.shape) if id_weights_need_gradient else None
    call.group["out_gradient"] = out_gradient.data_ptr()
    call.group["id_weights_gradient"] = 0 if of_ids is None else of_ids.data_ptr()
    call.run("qr_backward")
    return Gradients([None if d is None else d.to(w.dtype) for d, w in zip(dense, weights, strict=True)], of_ids)


def update_rows(weight: Tensor, rows: Tensor, gradients: Tensor, update: Update) -> None:
    """Steps ``rows`` (n,) int64, each once, of ``weight`` in place by their gradients (n, D_j)."""
    check_step(weight, rows, gradients)
    check_state(update, weight)
    rows, gradients = rows.contiguous(), gradients.to(torch.float32).contiguous()
    p = np.zeros(1, PARTITION)
    p["weight"], p["rows"], p["width"] = weight.data_ptr(), weight.shape[0], weight.shape[1]
    p["row_stride"], p["weight_type"] = max(weight.stride(0), weight.shape[1]), TYPES[weight.dtype]
    _write_updates(p, [update])
    failure = np.zeros(1, FAILURE)
    library = _library()
    assert library is not None
    if library.qr_step_rows(
        p.ctypes.data, rows.data_ptr(), gradients.data_ptr(), rows.numel(), cpu_library.isa(), failure.ctypes.data
    ):
        raise IndexError(f"row {int(failure[0]['value'])} is out of range [0, {weight.shape[0]})")


def _write_updates(partitions: np.ndarray[Any, Any], updates: list[Update | None]) -> None:
    """Writes steps into the structs of their partitions, column by column, because numpy is slow on one field."""
    rules, states, numbers = [], [], []
    # Tables of one optimizer have the same numbers.
    known: dict[tuple[int, float, int], list[float]] = {}
    for update in updates:
        if update is None:
            rules.append(0)
            states.append(_NO_STATES)
            numbers.append(_NO_NUMBERS)
            continue
        rule, state, learning_rate, t = update
        key = id(rule), learning_rate, t
        if key not in known:
            known[key] = rule.numbers(learning_rate, t)
        rules.append(rule.number)
        states.append([*(tensor.data_ptr() for tensor in state.values()), *_NO_STATES][:MAX_STATES])
        numbers.append(known[key])
    partitions["rule"], partitions["state"], partitions["numbers"] = rules, states, numbers


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

    def __init__(self, tables: Description, weights: list[Tensor], batch: Batch) -> None:
        self._tables, self._batch = tables, batch
        offsets = check_call(tables, weights, batch)
        self._ids, self._offsets = batch.ids.contiguous(), offsets.contiguous()
        self._weights = None if batch.weights is None else batch.weights.to(torch.float32).contiguous()
        structs = structs_of(tables)
        self.partitions = structs.partitions_with(weights, tables.class_maps)
        num_bags = (offsets.numel() - 1) // max(tables.num_features, 1) if batch.pooled else 0
        self.out_shape = (num_bags, tables.columns) if batch.pooled else (_floats(structs, self._offsets),)
        self.group = np.zeros(1, GROUP)
        self.group[0] = (
            *(structs.tables.ctypes.data, self.partitions.ctypes.data, self._ids.data_ptr(), self._offsets.data_ptr()),
            *(0 if self._weights is None else self._weights.data_ptr(), 0, 0, 0),
            *(len(structs.tables), tables.num_features, batch.ids.numel(), num_bags),
            *(tables.columns if batch.pooled else 0, TYPES[batch.ids.dtype], TYPES[offsets.dtype], batch.pooled),
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
        table = self._tables.names[int(failure["table"])] if failure["table"] >= 0 else ""
        match code:  # `Code` in csrc/lookup.h
            case 1:
                num_ids = self._tables.tables[int(failure["table"])].num_ids
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


def _floats(structs: Structs, offsets: Tensor) -> int:
    """Floats in the output of a batch that is not pooled."""
    starts, first = offsets.numpy(), structs.tables["first_feature"]
    ids = starts[first + structs.tables["num_features"]] - starts[first]
    # Offsets that are none are found by the library, which then writes nothing.
    return max(int(np.dot(ids.astype(np.int64), structs.tables["dim"])), 0)


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
