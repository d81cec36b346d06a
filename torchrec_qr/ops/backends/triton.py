"""Calls of the Triton kernels: tensors in, tensors out. Nothing waits for the device.

What the kernels refuse (ids out of range, offsets that are none) adds nothing to the output. A later call raises the
exception, which is the CPU kernels' own, once the verdict has reached the host: see `torchrec_qr.late_errors`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchrec_qr.late_errors import check_later, raise_pending
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
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.triton_kernels import launches
from torchrec_qr.ops.triton_kernels.device_tables import Descriptors, Stored, describe
from torchrec_qr.ops.update_rules import NUMBERS, Update

_NO_NUMBERS = [0.0] * len(NUMBERS)
_EMPTY = torch.empty(0)


def forward(tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
    """Returns (B, ΣD) fp32 if pooled, else the (N, D) of each table end to end, flat."""
    with _current(weights[0].device):
        call = _Call(tables, weights, batch)
        out = launches.look_up(call.descriptors, call.batch)
        call.done()
    return out


def backward(
    tables: Description,
    weights: list[Tensor],
    batch: Batch,
    out_gradient: Tensor,
    outcomes: list[Outcome],
    id_weights_need_gradient: bool,
) -> Gradients:
    """Steps rows in place, and returns the gradients that are needed.

    Other than on the CPU nothing but what is returned is of size (R, D): all sums are made of the values before the
    step, in a buffer of one row per unique row and 1/32 of a row per id.
    """
    with _current(weights[0].device):
        call = _Call(tables, weights, batch)
        out_gradient = call.checked(out_gradient)
        steps, dense = _steps(weights, outcomes)
        of_ids = None
        if id_weights_need_gradient:
            of_ids = launches.gradient_of_weights(call.descriptors, call.batch, out_gradient)
        wanted = [outcome is not None for outcome in outcomes]
        launches.step_weights(weights, call.row_sums(out_gradient, wanted), steps)
        call.done()
    return Gradients(dense, of_ids)


def launch_every_kernel(tables: Description, weights: list[Tensor], batch: Batch, outcomes: list[Outcome]) -> None:
    """Launches every kernel of `forward` and `backward`, so that they are compiled.

    Nothing changes, and no error is raised of ids that the tables lack: the rows to step are none, and the verdict on
    the batch is dropped.
    """
    with _current(weights[0].device):
        call = _Call(tables, weights, batch)
        out_gradient = torch.zeros_like(launches.look_up(call.descriptors, call.batch))
        if batch.weights is not None:
            launches.gradient_of_weights(call.descriptors, call.batch, out_gradient)
        sums = call.row_sums(out_gradient, [outcome is not None for outcome in outcomes])
        none = [own._replace(rows=torch.full_like(own.rows, -1)) for own in sums]
        launches.step_weights(weights, none, _steps(weights, outcomes)[0])


def update_rows(weight: Tensor, rows: Tensor, gradients: Tensor, update: Update) -> None:
    """As `torchrec_qr.ops.backends.cpu.update_rows`, but a row of -1 is none, and nothing checks that others exist.

    A caller need not wait for the number of rows: it may give every row, or -1 in its place.
    """
    check_step(weight, rows, gradients)
    check_state(update, weight)
    gradients = gradients.to(torch.float32).contiguous()
    with _current(weight.device):
        _refuse_capture(weight.device)
        sums = launches.RowSums(gradients, rows.contiguous(), torch.zeros_like(rows, dtype=torch.int32))
        states = [list(update.state.values())]
        steps = launches.Steps([update.rule.number], states, [_EMPTY], [_EMPTY], update.numbers())
        launches.step_weights([weight], [sums], steps)


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

    tables: Description
    ids: Tensor
    offsets: Tensor
    pooled: bool
    rows: list[int]

    def raise_failure(self, verdict: Tensor) -> None:
        """Raises what the kernels left in ``verdict`` (1,), on the host: see `report` in `triton_kernels.id_rows`."""
        failure = int(verdict)
        if failure == launches.NO_FAILURE:
            return
        offsets = self.offsets.tolist()
        if failure < 0:
            self._raise_offsets(offsets)
        num_bags = (len(offsets) - 1) // self.tables.num_features if self.pooled else 1
        feature, of_rows = 0, iter(self.rows)
        of_tables = zip(self.tables.tables, self.tables.names, self.tables.maps_of_tables(), strict=True)
        for table, name, class_map in of_tables:
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
        given = table.ids_of(self.ids[number : number + 1].cpu())
        value = int(given)
        if value >= table.num_ids >= 0 or (value < 0 and table.num_ids >= 0):
            raise IndexError(f"table {name!r}: id {value} (number {number}) is out of range [0, {table.num_ids})")
        on_host = None if class_map is None else class_map.cpu()
        for j, (partition, n) in enumerate(zip(table.partitions, num_rows, strict=True)):
            if not 0 <= int(partition.rows_of(given, on_host)) < n:
                raise IndexError(
                    f"table {name!r}: id number {number} has row {int(partition.rows_of(given, on_host))} of partition "
                    f"{j}, which is out of range"
                )


class _Call:
    """One call of the kernels: its arguments, checked as far as the host sees them."""

    def __init__(self, tables: Description, weights: list[Tensor], batch: Batch) -> None:
        _refuse_capture(weights[0].device)
        raise_pending(wait=False)
        offsets = check_call(tables, weights, batch)
        self._tables, self._device = tables, weights[0].device
        self._check = _Check(tables, batch.ids, offsets, batch.pooled, [w.shape[0] for w in weights])
        self.descriptors = _descriptors(tables, weights)
        self.batch = launches.batch_of(self.descriptors, batch.ids, offsets, batch.weights, batch.pooled)

    def checked(self, out_gradient: Tensor) -> Tensor:
        check_out_gradient(out_gradient, self.batch.out_shape, self._device)
        return out_gradient.to(torch.float32).contiguous()

    def row_sums(self, out_gradient: Tensor, wanted: list[bool]) -> list[launches.RowSums]:
        """Per number of partitions, the sums of all tables; those of none left out."""
        numbers = [j for table in self._tables.tables for j in range(len(table.partitions))]
        return [
            launches.sum_rows(self.descriptors, self.batch, out_gradient, number, wanted)
            for number in sorted({j for j, w in zip(numbers, wanted, strict=True) if w})
        ]

    def done(self) -> None:
        """Has what failed raised: at once, if kernels are interpreted, or when the verdict of a GPU has arrived."""
        if self.batch.failure.device.type == "cpu":
            self._check.raise_failure(self.batch.failure)
        else:
            check_later(self.batch.failure, self._check.raise_failure)


_Places = tuple[tuple[Stored, ...], tuple[Stored, ...], torch.device, int]
# The stream is part of the key: a copy on one stream is not ordered before its use on another, and the memory of an
# entry that is dropped goes back to the stream that it was allocated on.
_described: WeakKeyDictionary[Description, dict[_Places, Descriptors]] = WeakKeyDictionary()
_KEPT = 16  # of a description: weights that move leave entries behind


def _descriptors(tables: Description, weights: list[Tensor]) -> Descriptors:
    device = weights[0].device
    of_tables = _described.setdefault(tables, {})
    key = tuple(map(Stored.of, weights)), tuple(map(Stored.of, tables.class_maps)), device, launches.stream_of(device)
    found = of_tables.get(key)
    if found is None:
        if len(of_tables) == _KEPT:
            del of_tables[next(iter(of_tables))]
        found = of_tables[key] = describe(tables, key[0], key[1], device)
    return found


def _steps(weights: list[Tensor], outcomes: list[Outcome]) -> tuple[launches.Steps, list[Tensor | None]]:
    """Returns the steps as the kernels read them, and the dense gradients that they will write."""
    rules, states, numbers, touched = [], [], [], []
    dense: list[Tensor | None] = []
    for weight, outcome in zip(weights, outcomes, strict=True):
        check_outcome(outcome, weight)
        update = outcome if isinstance(outcome, Update) else None
        rules.append(
            launches.NOTHING if outcome is None else launches.GRADIENT if update is None else update.rule.number
        )
        states.append([] if update is None else list(update.state.values()))
        numbers += _NO_NUMBERS if update is None else update.numbers()
        is_dense = isinstance(outcome, DenseGradient)
        dense.append(torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) if is_dense else None)
        mask = outcome.touched if isinstance(outcome, DenseGradient) else None
        touched.append(_EMPTY if mask is None else mask)
    return launches.Steps(rules, states, [_EMPTY if d is None else d for d in dense], touched, numbers), dense
