"""Calls of the Triton kernels: tensors in, tensors out, as `torchrec_qr.ops.cpu`. Nothing waits for the device.

What the kernels refuse (ids out of range, offsets that are none) adds nothing to the output, and the exception, the
CPU kernels' own, is raised by a later call, once word of it has reached the host: see `torchrec_qr.late_errors`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_qr.late_errors import check_later, raise_pending
from torchrec_qr.ops.arguments import (
    GRADIENT,
    NOTHING,
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
from torchrec_qr.ops.cpu_structs import Plan, plan_of
from torchrec_qr.ops.layout import TableLayout, ids_of, rows_of
from torchrec_qr.ops.triton_kernels import run
from torchrec_qr.ops.triton_kernels.tables import Descriptors, Partition, Stored, Table, describe


def look_up(weights: list[Tensor], class_maps: list[Tensor], batch: Batch, layout: list[int], names: str) -> Tensor:
    """Returns (B, ΣD) fp32 if pooled, else the (N, D) of each table end to end, flat."""
    with _current(weights[0].device):
        call = _Call(weights, class_maps, batch, layout, names)
        out = run.look_up(call.descriptors, call.batch)
        call.done()
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
    """Steps rows in place, and returns a gradient per weight and that of the batch's weights; empty where not asked.

    Other than on the CPU nothing but what is returned is of size (R, D): all sums are made of the values before the
    step, in a buffer of one row per unique row and 1/32 of a row per id.
    """
    with _current(weights[0].device):
        call = _Call(weights, class_maps, batch, layout, names)
        out_gradient = call.checked(out_gradient)
        steps = _steps(weights, gradients)
        of_weights = torch.empty(0, device=weights[0].device)
        if weights_need_gradient:
            of_weights = run.gradient_of_weights(call.descriptors, call.batch, out_gradient)
        wanted = [rule != NOTHING for rule in gradients.rules]
        run.step_weights(weights, call.row_sums(out_gradient, wanted), steps)
        call.done()
    return [*steps.dense, of_weights]


def unique_gradients(
    out_gradient: Tensor,
    weights: list[Tensor],
    class_maps: list[Tensor],
    batch: Batch,
    layout: list[int],
    names: str,
) -> list[tuple[Tensor, Tensor]]:
    """Returns, per weight, the rows (U,) that were looked up, ascending, and their summed gradients (U, D_j) fp32.

    How many rows they are is the device's to say: this waits for it.
    """
    with _current(weights[0].device):
        call = _Call(weights, class_maps, batch, layout, names)
        sums = call.row_sums(call.checked(out_gradient), [True] * len(weights))
        call.done()
        return [run.unique_rows(call.descriptors, sums, i) for i in range(len(weights))]


def launch_every_kernel(
    weights: list[Tensor], class_maps: list[Tensor], batch: Batch, layout: list[int], names: str, gradients: Gradients
) -> None:
    """Launches every kernel of `look_up` and `propagate`, so that they are compiled.

    Nothing is changed, and nothing is said of ids that the tables lack: the rows to step are none, and the verdict on
    the batch is dropped.
    """
    with _current(weights[0].device):
        call = _Call(weights, class_maps, batch, layout, names)
        out_gradient = torch.zeros_like(run.look_up(call.descriptors, call.batch))
        if batch.weights is not None:
            run.gradient_of_weights(call.descriptors, call.batch, out_gradient)
        sums = call.row_sums(out_gradient, [rule != NOTHING for rule in gradients.rules])
        none = [own._replace(rows=torch.full_like(own.rows, -1)) for own in sums]
        run.step_weights(weights, none, _steps(weights, gradients))


def step_rows(
    weight: Tensor, rows: Tensor, gradients: Tensor, rule: str, states: list[Tensor], hyper: Sequence[float]
) -> None:
    """As `torchrec_qr.ops.cpu.step_rows`, but a row of -1 is none, and nothing checks that others are in the weight.

    A caller need not ask the device how many rows there are: it may give every row, or -1 in its place.
    """
    check_step(weight, rows, gradients)
    gradients = gradients.to(torch.float32).contiguous()
    number = RULES[rule]
    for state in states:
        check_state(state, weight, number)
    nothing = torch.empty(0)
    with _current(weight.device):
        _refuse_capture(weight.device)
        sums = run.RowSums(gradients, rows.contiguous(), torch.zeros_like(rows, dtype=torch.int32))
        run.step_weights([weight], [sums], run.Steps([number], [states], [nothing], [], list(hyper)))


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches there, and events are recorded there, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse_capture(device: torch.device) -> None:
    """Raises a RuntimeError in the capture of a CUDA graph, which would replay this step's rates and addresses."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a lookup of compositional tables cannot be captured in a CUDA graph, because its learning rates, checks "
            "and descriptors of tables come from the host at every call; capture the layers behind the lookup instead"
        )


class _Check(NamedTuple):
    """The names and values for an exception of a call; keeps the batch's ids and offsets until the verdict is known."""

    plan: Plan
    ids: Tensor
    offsets: Tensor
    pooled: bool
    class_maps: list[Tensor]
    rows: list[int]
    names: str

    def raise_failure(self, verdict: Tensor) -> None:
        """Raises what the kernels left in ``verdict`` (1,), on the host: see `report` in `triton_kernels.rows`."""
        failure = int(verdict)
        if failure == run.NO_FAILURE:
            return
        offsets = self.offsets.tolist()
        if failure < 0:
            self._raise_offsets(offsets)
        num_bags = (len(offsets) - 1) // self.plan.num_features if self.pooled else 1
        feature, of_maps, of_rows = 0, iter(self.class_maps), iter(self.rows)
        for table, name in zip(self.plan.layouts, self.names.split("\n"), strict=True):
            class_map = next(of_maps) if table.has_map else None
            rows = [next(of_rows) for _ in table.partitions]
            feature += table.num_features
            if failure < offsets[feature * num_bags]:
                self._raise_id(failure, table, name, rows, class_map)

    def _raise_offsets(self, offsets: list[int]) -> None:
        n = self.ids.numel()
        for position, after in enumerate(offsets):
            if after < (offsets[position - 1] if position else 0):
                raise ValueError(f"offsets[{position}] = {after} is less than the offset before it")
            if after > n or (after != 0 and position == 0) or (after != n and position == len(offsets) - 1):
                raise ValueError(f"offsets[{position}] = {after}; allowed: offsets from 0 to the number of ids, {n}")

    def _raise_id(
        self, number: int, table: TableLayout, name: str, num_rows: list[int], class_map: Tensor | None
    ) -> None:
        given = self.ids[number : number + 1].cpu()
        value = int(ids_of(table, given))
        if value >= table.num_ids >= 0 or (value < 0 and table.num_ids >= 0):
            raise IndexError(f"table {name!r}: id {value} (number {number}) is out of range [0, {table.num_ids})")
        rows = rows_of(table, given, None if class_map is None else class_map.cpu())
        for j, (row, n) in enumerate(zip(map(int, rows), num_rows, strict=True)):
            if not 0 <= row < n:
                raise IndexError(
                    f"table {name!r}: id number {number} has row {row} of partition {j}, which is out of range"
                )


class _Call:
    """One call of the kernels: what they are given, checked as far as the host sees it."""

    def __init__(
        self, weights: list[Tensor], class_maps: list[Tensor], batch: Batch, layout: list[int], names: str
    ) -> None:
        _refuse_capture(weights[0].device)
        raise_pending(wait=False)
        self._plan, self._given, self._class_maps, self._names = plan_of(tuple(layout)), batch, class_maps, names
        check_call(self._plan, weights, class_maps, batch, names)
        self._rows = [w.shape[0] for w in weights]
        places = tuple(map(Stored.of, weights)), tuple(map(Stored.of, class_maps))
        device = weights[0].device
        self.descriptors = _descriptors(tuple(layout), *places, device, run.stream_of(device))
        self.batch = run.batch_of(self.descriptors, batch.ids, batch.offsets, batch.weights, batch.pooled)

    def checked(self, out_gradient: Tensor) -> Tensor:
        check_out_gradient(out_gradient, self.batch.out_shape, self.descriptors.entries.device)
        return out_gradient.to(torch.float32).contiguous()

    def row_sums(self, out_gradient: Tensor, wanted: list[bool]) -> list[run.RowSums]:
        """Per number of partitions, the sums of all tables; those of none left out."""
        numbers = [j for table in self._plan.layouts for j in range(len(table.partitions))]
        return [
            run.sum_rows(self.descriptors, self.batch, out_gradient, number, wanted)
            for number in sorted({j for j, w in zip(numbers, wanted, strict=True) if w})
        ]

    def done(self) -> None:
        """Has what failed raised: at once, where kernels are interpreted, or when a GPU has told."""
        ids, offsets = self._given.ids, self._given.offsets
        check = _Check(self._plan, ids, offsets, self._given.pooled, self._class_maps, self._rows, self._names)
        if self.batch.failure.device.type == "cpu":
            check.raise_failure(self.batch.failure)
        else:
            check_later(self.batch.failure, check.raise_failure)


# The stream is part of the key: a copy on one stream is not ordered before its use on another, and the memory of an
# entry that is dropped goes back to the stream that it was allocated on.
@lru_cache(maxsize=256)
def _descriptors(
    layout: tuple[int, ...],
    weights: tuple[Stored, ...],
    class_maps: tuple[Stored, ...],
    device: torch.device,
    stream: int,
) -> Descriptors:
    of_weights, of_maps, tables = iter(weights), iter(class_maps), []
    for table in plan_of(layout).layouts:
        class_map = next(of_maps) if table.has_map else None
        partitions = tuple(
            Partition(next(of_weights), p.divisor, p.modulus, p.first_row, class_map, p.map_row)
            for p in table.partitions
        )
        tables.append(Table(table.operation, partitions, table.num_features, table.num_ids, table.mean, table.code))
    return describe(tuple(tables), device)


def _steps(weights: list[Tensor], gradients: Gradients) -> run.Steps:
    states, remaining = [], iter(gradients.states)
    for weight, rule in zip(weights, gradients.rules, strict=True):
        own = [next(remaining) for _ in range(num_states(rule))]
        for state in own:
            check_state(state, weight, rule)
        states.append(own)
    for touched, weight in zip(gradients.touched, weights if gradients.touched else [], strict=True):
        check_touched(touched, weight)
    dense = [
        torch.zeros(w.shape, dtype=w.dtype, device=w.device) if rule == GRADIENT else w.new_empty(0)
        for w, rule in zip(weights, gradients.rules, strict=True)
    ]
    return run.Steps(gradients.rules, states, dense, gradients.touched, gradients.hyper)
