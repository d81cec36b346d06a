"""A lookup's backward: its launches in order. Nothing here waits for the device."""

from collections.abc import Iterator
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..description import MAX_PARTITIONS
from . import steps as step_fields
from .device_tables import TYPES, WIDEST_READ, Descriptors, Stored, on_device
from .launcher import launch
from .launches import Batch, blocks_of, stream_of, tile_of, warps_of
from .long_rows import sum_long_rows, sum_supers
from .occurrences import BLOCK_RANGES, blocks_of_tables, keys_of_ids
from .steps import step_rows
from .sums import SUMS_ALIGN, sum_ranges

NOTHING, GRADIENT = step_fields.NOTHING.value, step_fields.GRADIENT.value
_MAX_INT32 = 2**31 - 1


class Cuts(NamedTuple):
    """Positions per range, and ranges per super: see `sums`."""

    chunk: int = 32
    super: int = 64


class RowSums(NamedTuple):
    """Summed gradients that wait for their step: ``sums[c]`` (·, widest D_j) fp32 is that of row ``rows[c]`` of weight
    ``weights[c]`` where rows[c] >= 0; elsewhere it holds nothing."""

    sums: Tensor
    rows: Tensor
    weights: Tensor


class _StepKernel(NamedTuple):
    RULE: int
    WIDTH: int
    TYPE: int
    ALIGN: int
    STATE_ALIGN: int


class _Sum(NamedTuple):
    """A launch sums partition ``target`` of the K of a group's tables, under one kernel of steps."""

    group: int
    target: int
    step_group: int


class _Pass(NamedTuple):
    """Partitions of one number whose rows are summed in one go: all that wait for their step, or all that do not.

    ``step_groups``: the kernels that step these rows.
    """

    number: int
    last: bool
    sums: list[_Sum]
    step_groups: list[int]
    entry_of: tuple[int, ...]  # `Descriptors.entry_of` of the number, without partitions that are not stepped


class Stepping(NamedTuple):
    """How weights are stepped, as long as they and their states lie where they do.

    ``of_weights``: the kernel of each weight; ``fields``: the weights' descriptors, without what is new at every step.
    """

    kernels: list[_StepKernel]
    of_weights: list[int]
    fields: list[int]
    passes: list[_Pass]


def stepping_of(
    weights: list[Tensor], rules: list[int], states: list[list[Tensor]], d: Descriptors | None = None
) -> Stepping:
    """Returns how weights are stepped.

    Args:
        rules: per weight, the number of its rule, GRADIENT, or NOTHING.
        states: per weight, up to three states.
        d: the tables of the weights, if they are to be stepped by `step_looked_up_rows`.
    """
    kernels: dict[_StepKernel, int] = {}
    of_weights: list[int] = []
    fields: list[int] = []
    for w, rule, own in zip(map(Stored.of, weights), rules, states, strict=True):
        addresses = [state.data_ptr() for state in own]
        # A dense gradient lies where PyTorch's memory begins.
        kernel = _StepKernel(rule, w.width, TYPES[w.dtype], w.alignment, gcd(WIDEST_READ, *addresses))
        of_weights.append(kernels.setdefault(kernel, len(kernels)))
        fields += [w.address, w.row_stride, of_weights[-1], 0, 0, *addresses, *[0] * (3 - len(addresses))]
    passes = [] if d is None else list(_passes(d, [rule != NOTHING for rule in rules], of_weights))
    return Stepping(list(kernels), of_weights, fields, passes)


class Step(NamedTuple):
    """A step brings, per weight, the dense gradient to write and the mask to mark, if any; and all numbers."""

    dense: list[Tensor | None]
    touched: list[Tensor | None]
    numbers: list[float]


class _DescribedStep(NamedTuple):
    """Weights' descriptors and their numbers, on the device."""

    kernels: list[_StepKernel]
    weights: Tensor
    numbers: Tensor


def step_on_device(stepping: Stepping, step: Step, device: torch.device) -> _DescribedStep:
    """Brings to the device what kernels read of a step."""
    fields = stepping.fields
    if any(t is not None for t in (*step.dense, *step.touched)):
        fields = fields.copy()
        for i, (dense, touched) in enumerate(zip(step.dense, step.touched, strict=True)):
            first = i * step_fields.WEIGHT_FIELDS.value
            fields[first + step_fields.DENSE.value] = 0 if dense is None else dense.data_ptr()
            fields[first + step_fields.TOUCHED.value] = 0 if touched is None else touched.data_ptr()
    stream = stream_of(device)
    return _DescribedStep(
        stepping.kernels,
        kept_on_device(tuple(fields), torch.int64, device, stream),
        kept_on_device(tuple(step.numbers), torch.float32, device, stream),
    )


# The stream is part of the key, because a copy on one stream is not ordered before its use on another. Replicated
# partitions are stepped on the streams of a pool, in turn.
@lru_cache(maxsize=1024)
def kept_on_device(numbers: tuple[int | float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """Returns numbers on the device, which many steps share."""
    return on_device(numbers, dtype, device)


def step_looked_up_rows(
    d: Descriptors,
    batch: Batch,
    out_gradient: Tensor,
    stepping: Stepping,
    step: Step,
    cuts: Cuts = Cuts(),  # noqa: B008
) -> None:
    """Steps every row that was looked up once, by its summed gradient, which is of the values before the step."""
    if not batch.ids.numel():
        return
    described = step_on_device(stepping, step, d.entries.device)
    ranges, keys = _ranges(d, batch, cuts), _keys(d, batch, out_gradient)
    waiting: list[tuple[RowSums, list[int]]] = []
    for of in stepping.passes:
        sums = None if of.last else _room(d.keys[of.number], batch.ids.numel(), ranges.heads)
        _sum(of, d, batch, out_gradient, described, ranges, keys, sums, cuts)
        if sums is not None:
            waiting.append((sums, of.step_groups))
    for own, step_groups in waiting:
        _step_waiting(own, step_groups, described)


def step_summed_rows(row_sums: RowSums, stepping: Stepping, step: Step) -> None:
    """Steps every row of ``row_sums`` once; writes its dense gradient, and marks it, if there is memory for that."""
    _step_waiting(row_sums, stepping.of_weights, step_on_device(stepping, step, row_sums.sums.device))


def _step_waiting(own: RowSums, step_groups: list[int], step: _DescribedStep) -> None:
    stride, count = own.sums.stride(0), own.rows.numel()
    align = gcd(WIDEST_READ // 4, stride)
    for group in step_groups:
        kernel = step.kernels[group]
        tile = tile_of(kernel.WIDTH)
        arguments = (own.rows, own.weights, own.sums, step.weights, step.numbers, group, count, stride)
        fixed = (*kernel, align, tile.lanes, tile.block_d)
        launch(step_rows, (triton.cdiv(count, tile.lanes), 1), arguments, fixed, warps_of(tile, 1, kernel.RULE))


class _Ranges(NamedTuple):
    """The ranges of a batch: how many there may be, the block and position that tables begin with, and room for what
    ranges have of rows that lie in several."""

    number: int
    first_block: Tensor
    first_id: Tensor
    heads: Tensor
    tails: Tensor


def _ranges(d: Descriptors, batch: Batch, cuts: Cuts) -> _Ranges:
    device, n, num_tables = d.entries.device, batch.ids.numel(), len(d.tables)
    count = (triton.cdiv(n, cuts.chunk * BLOCK_RANGES.value) + num_tables) * BLOCK_RANGES.value
    # Each begins where 16 bytes do, as kernels take it.
    bounds = torch.empty(2, triton.cdiv(num_tables + 1, 4) * 4, dtype=torch.int32, device=device)
    stride = triton.cdiv(max(d.widths), SUMS_ALIGN.value) * SUMS_ALIGN.value
    shares = torch.empty(2, count, stride, device=device)
    launch(
        blocks_of_tables,
        (1, 1),
        (*bounds, batch.offsets, d.first_feature, batch.num_bags(d), n, num_tables),
        (cuts.chunk, triton.next_power_of_2(num_tables + 1)),
        4,
    )
    return _Ranges(count, *bounds, *shares)


class _Keys(NamedTuple):
    """Keys of ids, for each partition number, and where the gradients of their outputs begin: see `occurrences`."""

    of_numbers: list[Tensor]
    starts: Tensor

    def padded(self) -> list[Tensor | None]:
        return [*self.of_numbers, *[None] * (MAX_PARTITIONS - len(self.of_numbers))]


def _key_type(count: int) -> torch.dtype:
    """The narrowest type of ``count`` keys: sorting takes a pass over all for each byte."""
    narrow = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))
    return next((dtype for dtype, beyond in narrow if count <= beyond), torch.int64)


def _keys(d: Descriptors, batch: Batch, out_gradient: Tensor) -> _Keys:
    device, n = d.entries.device, batch.ids.numel()
    of_numbers = [torch.empty(n, dtype=_key_type(count), device=device) for count in d.keys]
    starts_type = torch.int32 if out_gradient.numel() // d.out_align <= _MAX_INT32 else torch.int64
    keys = _Keys(of_numbers, torch.empty(n, dtype=starts_type, device=device))
    for group in d.groups:
        of_batch = (batch.ids, batch.offsets, d.entries, batch.flat_starts, batch.failure)
        sizes = (group.first, batch.num_bags(d), d.num_features, n, d.columns)
        kernel = group.kernel
        fixed = (kernel.K, group.part or 0, kernel.MAP, kernel.GIVEN, kernel.NARROW, d.out_align, batch.pooled, 128)
        grid = (blocks_of(128, batch, d), group.size)
        launch(keys_of_ids, grid, (*keys.padded(), keys.starts, *of_batch, *sizes), fixed, 4)
    return keys


def _passes(d: Descriptors, wanted: list[bool], step_group: list[int]) -> Iterator[_Pass]:
    """Those that wait come first, because a last pass changes the rows that they read."""
    for last in (False, True):
        for number in range(len(d.keys)):
            sums: list[_Sum] = []
            step_groups: dict[int, None] = {}
            for index, group in enumerate(d.groups):
                target = group.target(number)
                if target is not None and group.is_last(number) == last:
                    of_tables = (weights[target] for weights in group.weights)
                    own = dict.fromkeys(step_group[w] for w in of_tables if wanted[w])
                    # Of rows that wait, one launch sums all, however they are stepped.
                    sums += [_Sum(index, target, of) for of in (own if last else [*own][:1])]
                    step_groups |= own
            if sums:
                yield _Pass(number, last, sums, [*step_groups], _only(d, number, wanted))


def _sum(
    of: _Pass,
    d: Descriptors,
    batch: Batch,
    out_gradient: Tensor,
    steps: _DescribedStep,
    ranges: _Ranges,
    keys: _Keys,
    sums: RowSums | None,
    cuts: Cuts,
) -> None:
    sorted_keys, order = torch.sort(keys.of_numbers[of.number], stable=True)
    device = d.entries.device
    entry_of = kept_on_device(of.entry_of, torch.int32, device, stream_of(device))
    stride, num_tables = ranges.heads.stride(0), len(d.tables)
    by_key = int(d.keys[of.number] <= batch.ids.numel())
    shares = ranges.heads, ranges.tails, *(sums or (None, None, None))
    bounds = ranges.first_block, ranges.first_id, batch.failure
    of_ids = (*keys.padded(), keys.starts, batch.weights)
    launched = []
    for s in of.sums:
        kernel, step = d.groups[s.group].kernel, steps.kernels[s.step_group]
        described = (d.entries, entry_of, *bounds, steps.weights, steps.numbers, s.group, s.step_group)
        launched.append((kernel, s.target, (of.last, step.RULE, step.ALIGN, step.STATE_ALIGN), described))
    for kernel, target, stepped, described in launched:
        tile, rule = tile_of(kernel.WIDTH), stepped[1]
        launch(
            sum_ranges,
            (ranges.number // tile.lanes, 1),
            (*shares, out_gradient, sorted_keys, order, *of_ids, *described, num_tables, stride, by_key),
            (
                *(kernel.K, kernel.WIDTH, kernel.TYPES, kernel.ALIGN, kernel.MULT, target, d.out_align),
                *(batch.weights is not None, *stepped, cuts.chunk, tile.lanes, tile.block_d),
            ),
            warps_of(tile, kernel.K, rule),
        )
    width = d.widths[of.number]
    tile = tile_of(width)
    launch(
        sum_supers,
        (triton.cdiv(ranges.number, cuts.super), 1),
        (ranges.heads, sorted_keys, *bounds, num_tables, stride, width),
        (cuts.chunk, cuts.super, tile.lanes, tile.block_d),
        tile.warps,
    )
    for kernel, target, stepped, described in launched:
        tile, rule = tile_of(kernel.WIDTH), stepped[1]
        launch(
            sum_long_rows,
            (ranges.number, 1),
            (*shares, sorted_keys, *described, num_tables, stride, by_key),
            (
                *(kernel.WIDTH, (kernel.TYPES >> (2 * target)) & 3, target),
                *(*stepped, cuts.chunk, cuts.super, tile.lanes, tile.block_d),
            ),
            warps_of(tile, 1, rule),
        )


def _room(num_keys: int, num_ids: int, heads: Tensor) -> RowSums:
    """Returns memory for the sums of rows: see `finish_row` in `sums`."""
    count = min(num_keys, num_ids)
    rows = torch.full((count,), -1, dtype=torch.int64, device=heads.device)
    return RowSums(heads.new_empty(count, heads.stride(0)), rows, torch.empty_like(rows, dtype=torch.int32))


def _only(d: Descriptors, number: int, wanted: list[bool]) -> tuple[int, ...]:
    """Returns `Descriptors.entry_of`, without the tables whose partition ``number`` is not wanted."""
    chosen: list[int] = []
    index = 0
    for table, entry in zip(d.tables, d.entry_of[number], strict=True):
        count = len(table.partitions)
        chosen.append(entry if number < count and wanted[index + number] else -1)
        index += count
    return tuple(chosen)
