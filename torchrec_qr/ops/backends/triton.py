"""Calls of the Triton kernels: tensors in, tensors out. Nothing waits for the device.

What the kernels refuse (ids out of range, offsets that are none) adds nothing to the output. A later call raises the
exception, which is the CPU kernels' own, once the verdict has reached the host: see `torchrec_qr.late_errors`.
"""

from collections.abc import Callable
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
    Replica,
    check_batch,
    check_call,
    check_out_gradient,
    check_outcome,
    check_replica,
    check_state,
    check_step,
)
from torchrec_qr.ops.description import Description, TableLayout
from torchrec_qr.ops.triton_kernels import backward_launches, id_launches, launches, replica_launches
from torchrec_qr.ops.triton_kernels.device_tables import WIDEST_READ, Descriptors, Stored, describe
from torchrec_qr.ops.update_rules import NUMBERS, Update

fields_of_sent = id_launches.fields_of
_NO_NUMBERS = [0.0] * len(NUMBERS)


def forward(tables: Description, weights: list[Tensor], batch: Batch) -> Tensor:
    """Returns (B, ΣD) fp32 if pooled, else the (N, D) of each table end to end, flat."""
    with _current(weights[0].device):
        _begin(weights[0].device)
        call = _Call(tables, weights, batch)
        out = launches.look_up(call.found.descriptors, call.batch)
        call.done()
    if batch.kept is not None:
        batch.kept.append(call)
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

    All sums are made of the values before the step. Rows of the partition with most of a table are stepped as soon as
    they are summed; the sums of the others wait, in a buffer of a row for each of theirs.
    """
    with _current(weights[0].device):
        _begin(weights[0].device)
        of_forward: _Call | None = batch.kept[0] if batch.kept else None
        known = of_forward is not None and of_forward.key == _key(tables, weights)
        call = of_forward if of_forward is not None and known else _Call(tables, weights, batch)
        out_gradient = call.checked(out_gradient)
        of_ids = None
        if id_weights_need_gradient:
            of_ids = launches.gradient_of_weights(call.found.descriptors, call.batch, out_gradient)
        dense = call.step(weights, out_gradient, outcomes)
        if not known:  # else the forward has told, or will tell, what is wrong with the batch
            call.done()
    return Gradients(dense, of_ids)


def launch_every_kernel(tables: Description, weights: list[Tensor], batch: Batch, outcomes: list[Outcome]) -> None:
    """Launches every kernel of `forward` and `backward`, so that they are compiled.

    Nothing changes, and no error is raised of ids that the tables lack: the batch is taken for a wrong one, and the
    verdict on it is dropped.
    """
    with _current(weights[0].device):
        _begin(weights[0].device)
        call = _Call(tables, weights, batch)
        out_gradient = torch.zeros_like(launches.look_up(call.found.descriptors, call.batch))
        if batch.weights is not None:
            launches.gradient_of_weights(call.found.descriptors, call.batch, out_gradient)
        call.batch.failure.fill_(launches.OFFSET_FAILURE)  # kernels then step nothing
        call.step(weights, out_gradient, outcomes)


def update_rows(weight: Tensor, rows: Tensor, gradients: Tensor, update: Update) -> None:
    """As `torchrec_qr.ops.dispatch.update_rows`, but nothing checks that rows exist."""
    check_step(weight, rows, gradients)
    check_state(update, weight)
    gradients = _aligned(gradients)
    with _current(weight.device):
        _refuse_capture(weight.device)
        of_first = torch.zeros_like(rows, dtype=torch.int32)
        sums = backward_launches.RowSums(gradients, rows.contiguous(), of_first)
        stepping = backward_launches.stepping_of([weight], [update.rule.compiled_number], [list(update.state.values())])
        backward_launches.step_summed_rows(sums, stepping, backward_launches.Step([None], [None], update.numbers()))


def update_replicas(replicas: list[Replica]) -> None:
    """Steps the rows of replicas, all on one device, that have been looked up or have a gradient that is not 0."""
    device = replicas[0].weight.device
    key = tuple([_replica_key(r) for r in replicas])
    stepping = _replicas.get(key)
    if stepping is None:
        for r in replicas:
            check_replica(r)
        stepping = replica_launches.replica_stepping_of(replicas)
        _keep(_replicas, key, stepping, most=_REPLICAS_KEPT)
    with _current(device):
        _refuse_capture(device)
        replica_launches.step_all(replicas, stepping)


def send_ids(
    fields: tuple[int, ...], ids: Tensor, offsets: Tensor, most_ids: int, raise_at: Callable[[int], None]
) -> Tensor:
    """See `torchrec_qr.ops.dispatch.SendIds`."""
    with _current(ids.device):
        sent = id_launches.send(fields, ids, offsets, most_ids)

        def check(verdict: Tensor) -> None:
            number = int(verdict)
            if number != launches.NO_FAILURE:
                raise_at(number)

        _check_when_known(sent.failure, check)
    return sent.ids


def _aligned(gradient: Tensor) -> Tensor:
    """The gradient in fp32 and, as kernels read several numbers at once, where PyTorch's memory begins or like that."""
    gradient = gradient.to(torch.float32).contiguous()
    return gradient if gradient.data_ptr() % WIDEST_READ == 0 else gradient.clone()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches there, and events are recorded there, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _begin(device: torch.device) -> None:
    """Refuses a call that cannot be, and raises what an earlier one has left."""
    _refuse_capture(device)
    raise_pending(wait=False)


def _check_when_known(failure: Tensor, check: Callable[[Tensor], None]) -> None:
    """Calls ``check`` at once if kernels are interpreted, or else when the verdict of a GPU has arrived."""
    if failure.device.type == "cpu":
        check(failure)
    else:
        check_later(failure, check)


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
        for i, (table, class_map) in enumerate(zip(self.tables.tables, self.tables.maps_of_tables(), strict=True)):
            rows = [next(of_rows) for _ in table.partitions]
            for _ in range(table.num_features):
                if failure < offsets[(feature + 1) * num_bags]:
                    self._raise_id(failure, table, self.tables.label(i, feature), rows, class_map)
                feature += 1

    def _raise_offsets(self, offsets: list[int]) -> None:
        n = self.ids.numel()
        for position, after in enumerate(offsets):
            if after < (offsets[position - 1] if position else 0):
                raise ValueError(f"offsets[{position}] = {after} is less than the offset before it")
            if after > n or (after != 0 and position == 0) or (after != n and position == len(offsets) - 1):
                raise ValueError(f"offsets[{position}] = {after}; allowed: offsets from 0 to the number of ids, {n}")

    def _raise_id(
        self, number: int, table: TableLayout, label: str, num_rows: list[int], class_map: Tensor | None
    ) -> None:
        given = table.ids_of(self.ids[number : number + 1].cpu())
        value = int(given)
        if value >= table.num_ids >= 0 or (value < 0 and table.num_ids >= 0):
            raise IndexError(f"{label}: id {value} (number {number}) is out of range [0, {table.num_ids})")
        on_host = None if class_map is None else class_map.cpu()
        for j, (partition, n) in enumerate(zip(table.partitions, num_rows, strict=True)):
            if not 0 <= int(partition.rows_of(given, on_host)) < n:
                raise IndexError(
                    f"{label}: id number {number} has row {int(partition.rows_of(given, on_host))} of partition "
                    f"{j}, which is out of range"
                )


class _Call:
    """One call of the kernels: its arguments, checked as far as the host sees them."""

    def __init__(self, tables: Description, weights: list[Tensor], batch: Batch) -> None:
        device = weights[0].device
        self.key = _key(tables, weights)
        of_tables = _described.setdefault(tables, {})
        found = of_tables.get(self.key)
        if found is None:
            offsets = check_call(tables, weights, batch)
            stored, maps = list(map(Stored.of, weights)), list(map(Stored.of, tables.class_maps))
            found = _Found(describe(tables, stored, maps, device), {})
            _keep(of_tables, self.key, found)
        else:
            offsets = check_batch(tables, batch, device)
        self.found, self._device = found, device
        self._check = _Check(tables, batch.ids, offsets, batch.pooled, [w.shape[0] for w in weights])
        self.batch = launches.batch_of(found.descriptors, batch.ids, offsets, batch.weights, batch.pooled)

    def checked(self, out_gradient: Tensor) -> Tensor:
        check_out_gradient(out_gradient, self.batch.out_shape, self._device)
        return _aligned(out_gradient)

    def done(self) -> None:
        _check_when_known(self.batch.failure, self._check.raise_failure)

    def step(self, weights: list[Tensor], out_gradient: Tensor, outcomes: list[Outcome]) -> list[Tensor | None]:
        """Steps rows, and returns the dense gradient of each weight that has one."""
        key = tuple(map(_outcome_key, outcomes))
        stepping = self.found.stepping.get(key)
        if stepping is None:
            for weight, outcome in zip(weights, outcomes, strict=True):
                check_outcome(outcome, weight)
            rules = [of if isinstance(of, int) else of[0] for of in key]
            states = [list(o.state.values()) if isinstance(o, Update) else [] for o in outcomes]
            stepping = backward_launches.stepping_of(weights, rules, states, self.found.descriptors)
            _keep(self.found.stepping, key, stepping)
        dense = _dense_gradients(weights, outcomes)
        touched = [o.touched if isinstance(o, DenseGradient) else None for o in outcomes]
        step = backward_launches.Step(dense, touched, _numbers(outcomes))
        backward_launches.step_looked_up_rows(self.found.descriptors, self.batch, out_gradient, stepping, step)
        return dense


def _dense_gradients(weights: list[Tensor], outcomes: list[Outcome]) -> list[Tensor | None]:
    """Returns zeros for each weight that has a dense gradient, in memory that is filled by one launch per type."""
    dense: list[Tensor | None] = [None] * len(weights)
    of_types: dict[torch.dtype, list[int]] = {}
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, DenseGradient):
            of_types.setdefault(weights[i].dtype, []).append(i)
    for dtype, members in of_types.items():
        # Begin each where kernels can read and write several numbers at once.
        apart = WIDEST_READ // dtype.itemsize
        sizes = [-(-weights[i].numel() // apart) * apart for i in members]
        pieces = torch.zeros(sum(sizes), dtype=dtype, device=weights[0].device).split(sizes)
        for i, piece in zip(members, pieces, strict=True):
            own = piece if len(piece) == weights[i].numel() else piece[: weights[i].numel()]
            dense[i] = own.view(weights[i].shape)
    return dense


class _Found(NamedTuple):
    """Descriptors of tables whose weights lie at some place, and how these are stepped, by `_outcome_key`."""

    descriptors: Descriptors
    stepping: dict[Any, backward_launches.Stepping]


_described: WeakKeyDictionary[Description, dict[Any, _Found]] = WeakKeyDictionary()
_KEPT = 16  # of a description, because weights that move leave entries behind


_replicas: dict[Any, replica_launches.ReplicaStepping] = {}
_REPLICAS_KEPT = 256  # of a process, because each bucket of a model has one


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int = _KEPT) -> None:
    """Keeps a value, and drops the oldest if there are many."""
    if len(kept) == most:
        del kept[next(iter(kept))]
    kept[key] = value


def _key(tables: Description, weights: list[Tensor]) -> Any:
    """Returns the places and types of weights and class maps, and the stream.

    The stream is part of the key, because a copy on one stream is not ordered before its use on another, and the memory
    of an entry that is dropped goes back to the stream that it was allocated on.
    """
    return launches.stream_of(weights[0].device), tuple([_place(t) for t in (*weights, *tables.class_maps)])


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _outcome_key(outcome: Outcome) -> Any:
    """The number of a rule, and where its states lie; what lies elsewhere at every step is left out, but checked."""
    if outcome is None:
        return backward_launches.NOTHING
    if isinstance(outcome, Update):
        return outcome.rule.compiled_number, *[_place(state) for state in outcome.state.values()]
    touched = outcome.touched
    # A mask that does not fit gets a key of its own, which is then checked.
    return backward_launches.GRADIENT if touched is None else (backward_launches.GRADIENT, *_place(touched)[1:])


def _replica_key(replica: Replica) -> Any:
    """Returns what a replica's stepping depends on: not its gradient's place, which may be new at every step."""
    given = [None if t is None else _place(t)[1:] for t in (replica.gradient, replica.looked_up, replica.mask)]
    return (
        *(_place(replica.weight), replica.gradient.data_ptr() % WIDEST_READ, *given),
        _outcome_key(replica.update),
    )


def _numbers(outcomes: list[Outcome]) -> list[float]:
    """The numbers of all updates, one after the other."""
    of_rules: dict[Any, list[float]] = {}
    numbers: list[float] = []
    for outcome in outcomes:
        if not isinstance(outcome, Update):
            numbers += _NO_NUMBERS
            continue
        key = id(outcome.rule), outcome.learning_rate, outcome.t
        own = of_rules.get(key)
        if own is None:
            own = of_rules[key] = outcome.numbers()
        numbers += own
    return numbers
