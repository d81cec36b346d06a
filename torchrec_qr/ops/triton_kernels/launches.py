"""A lookup and its backward: the kernels in order. Nothing here waits for the device."""

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import steps as step_fields
from .device_tables import TYPES, WIDEST_READ, Descriptors, Group, Stored, on_device
from .forward import forward, weights_gradient
from .occurrences import chunks_of_keys, keys_of_ids
from .steps import step_rows
from .sums import SUMS_ALIGN, sum_chunks, sum_runs, sum_supers

# What `failure` holds where nothing failed.
NO_FAILURE = 2**63 - 1
NOTHING, GRADIENT = step_fields.NOTHING.value, step_fields.GRADIENT.value
_MAX_INT32 = 2**31 - 1


class Batch(NamedTuple):
    """ids (N,), offsets (F·B + 1,) if ``pooled`` else (F + 1,), weights (N,) fp32 or None: contiguous, on the device.

    flat_starts: not pooled, per entry s: its columns of id n begin at s + n · D in the output. failure: see `report` in
    `rows`.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    pooled: bool
    flat_starts: Tensor
    out_shape: tuple[int, ...]
    failure: Tensor
    most_ids: int  # of a feature, at most

    def num_bags(self, d: Descriptors) -> int:
        return (self.offsets.numel() - 1) // d.num_features if self.pooled else 1


def batch_of(d: Descriptors, ids: Tensor, offsets: Tensor, weights: Tensor | None, pooled: bool) -> Batch:
    """Brings what is looked up to the device.

    The size of an output that is not pooled follows from the number of ids if all tables are of one width, else from
    ``offsets`` on the CPU.
    """
    device, n = d.entries.device, ids.numel()
    if n > _MAX_INT32 or offsets.numel() > _MAX_INT32:
        raise ValueError(f"{n} ids in {offsets.numel() - 1} bags; allowed: at most {_MAX_INT32} of either")
    flat_starts, most_ids = d.parts, n
    shape: tuple[int, ...] = ((offsets.numel() - 1) // d.num_features, d.columns)
    if not pooled:
        dims = {of.dim for of in d.tables}
        if len(dims) == 1:
            shape = (n * dims.pop(),)
        else:
            flat_starts, floats = _flat_starts(d, offsets.tolist())
            shape = (floats,)
        if offsets.device.type == "cpu":
            most_ids = min(max(int(offsets.diff().max()), 0), n)
    if offsets.device != device:
        offsets = offsets.pin_memory() if device.type == "cuda" else offsets
        offsets = offsets.to(device, non_blocking=True)
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    failure = torch.full((1,), NO_FAILURE, dtype=torch.int64, device=device)
    return Batch(ids.contiguous(), offsets.contiguous(), weights, pooled, flat_starts, shape, failure, most_ids)


def _flat_starts(d: Descriptors, offsets: list[int]) -> tuple[Tensor, int]:
    """Returns ``Batch.flat_starts``, and the number of floats of the output."""
    start_of, floats, feature = [], 0, 0
    for of in d.tables:
        first, last = offsets[feature], offsets[feature + of.num_features]
        start_of.append(floats - first * of.dim)
        floats += max(last - first, 0) * of.dim
        feature += of.num_features
    per_entry = on_device([start_of[t] for t in d.table_of_entry], torch.int64, d.entries.device)
    return per_entry + d.parts, floats


def _tile(width: int) -> dict[str, int]:
    """Tiles of a thousand numbers: eight per thread of four warps, in two reads of 16 bytes of fp32."""
    block = triton.next_power_of_2(width)
    return {"LANES": max(1, min(64, 1024 // block)), "BLOCK_D": block}


def _short_tile(width: int) -> dict[str, int]:
    """As `_tile`, of at most 16 lanes.

    Do not take more in a loop over rows of few columns, because Triton 3.6.0 and 3.7.1 then fail to compile it for some
    tables: a pass that removes conversions of layouts leaves a load with a mask of another layout.
    """
    tile = _tile(width)
    return {**tile, "LANES": min(tile["LANES"], 16)}


def _out_align(d: Descriptors) -> int:
    """Floats at whose multiples every entry's columns begin."""
    return gcd(WIDEST_READ // 4, *(width for of in d.tables for width in of.widths))


def _blocks(lanes: int, batch: Batch, d: Descriptors) -> int:
    return triton.cdiv(batch.num_bags(d) if batch.pooled else batch.most_ids, lanes)


def stream_of(device: torch.device) -> int:
    """Returns which stream of a device launches go to, as a number; 0 on a CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def look_up(d: Descriptors, batch: Batch) -> Tensor:
    """Returns (B, ΣD) fp32 if pooled, else the (N, D) of each table end to end, flat."""
    device = d.entries.device
    # Not pooled, offsets that do not cover the ids leave holes, and are reported.
    out = torch.empty(batch.out_shape, device=device) if batch.pooled else torch.zeros(batch.out_shape, device=device)
    for group in d.groups:
        tile = _tile(group.kernel.WIDTH)
        grid = (_blocks(tile["LANES"], batch, d), group.size)
        if not grid[0]:
            continue
        forward[grid](
            *(out, batch.ids, batch.offsets, batch.weights, d.entries, batch.flat_starts, batch.failure),
            *(group.first, batch.num_bags(d), d.num_features, batch.ids.numel(), d.columns),
            **group.kernel._asdict(),
            OUT_ALIGN=_out_align(d),
            POOLED=batch.pooled,
            WEIGHTED=batch.weights is not None,
            **tile,
        )
    return out


def gradient_of_weights(d: Descriptors, batch: Batch, out_gradient: Tensor) -> Tensor:
    """Returns (N,) fp32: the gradient of the ids' weights."""
    of_ids = torch.zeros(batch.ids.shape, device=d.entries.device)
    for group in d.groups:
        tile = _short_tile(group.kernel.WIDTH)
        grid = (_blocks(tile["LANES"], batch, d), group.size)
        if not grid[0]:
            continue
        weights_gradient[grid](
            *(of_ids, out_gradient, batch.ids, batch.offsets, d.entries, batch.flat_starts, batch.failure),
            *(group.first, batch.num_bags(d), d.num_features, batch.ids.numel(), d.columns),
            **group.kernel._asdict(),
            OUT_ALIGN=_out_align(d),
            POOLED=batch.pooled,
            **tile,
        )
    return of_ids


class Cuts(NamedTuple):
    """Ids per chunk, and chunks per super: see `sums`."""

    chunk: int = 32
    super: int = 64


class RowSums(NamedTuple):
    """Summed gradients of one partition number: ``sums[c]`` (·, widest D_j) fp32 is that of row ``rows[c]`` of weight
    ``weights[c]`` where rows[c] >= 0; elsewhere it holds nothing."""

    sums: Tensor
    rows: Tensor
    weights: Tensor


def sum_rows(
    d: Descriptors,
    batch: Batch,
    out_gradient: Tensor,
    number: int,
    wanted: list[bool],
    cuts: Cuts = Cuts(),  # noqa: B008
) -> RowSums:
    """Sums the gradients of the rows of every table's partition ``number``.

    Args:
        wanted: per weight, whether its rows are summed.
    """
    device, n = d.entries.device, batch.ids.numel()
    entry_of, no_key = d.entry_of[number], d.keys[number]
    if not all(wanted):
        entry_of = _only(d, number, tuple(wanted))
    width = max(of.widths[number] for of in d.tables if number < len(of.widths))
    stride = triton.cdiv(width, SUMS_ALIGN.value) * SUMS_ALIGN.value
    num_cuts = triton.cdiv(n, cuts.chunk)
    capacity = min(n, no_key + 1) + num_cuts
    rows = torch.full((capacity,), -1, dtype=torch.int64, device=device)
    entry_of_chunk = torch.full((capacity,), -1, dtype=torch.int32, device=device)
    weight_of_chunk = torch.zeros(capacity, dtype=torch.int32, device=device)
    sums = torch.empty(capacity, stride, device=device)
    if not n:
        return RowSums(sums, rows, weight_of_chunk)
    key_type = torch.int32 if no_key < _MAX_INT32 else torch.int64
    keys = torch.full((n,), no_key, dtype=key_type, device=device)
    bag_of = torch.zeros(n, dtype=torch.int32, device=device)
    num_bags = batch.num_bags(d)
    for group, target in _targets(d, number):
        keys_of_ids[_blocks(128, batch, d), group.size](
            *(keys, bag_of, batch.ids, batch.offsets, d.entries, entry_of, batch.failure),
            *(group.first, num_bags, d.num_features, n),
            **_only_fields(group, "K", "MAP", "CODED"),
            TARGET=target,
            POOLED=batch.pooled,
            LANES=128,
        )
    keys, order = torch.sort(keys, stable=True)
    starts_chunk = torch.ones(n, dtype=torch.bool, device=device)
    torch.ne(keys[1:], keys[:-1], out=starts_chunk[1:])
    starts_chunk[:: cuts.chunk] = True
    chunk_numbers = starts_chunk.cumsum(0, dtype=torch.int32)
    starts = torch.full((capacity + 1,), n, dtype=torch.int32, device=device)
    chunks_of_keys[(triton.cdiv(n, 256),)](
        *(starts, rows, entry_of_chunk, weight_of_chunk, keys, chunk_numbers, order, bag_of),
        *(entry_of, d.target_of[number], d.entries, num_bags, n, no_key),
        BLOCK=256,
    )
    for group, target in _targets(d, number):
        tile = _short_tile(group.kernel.WIDTH)
        sum_chunks[(triton.cdiv(capacity, tile["LANES"]),)](
            *(sums, out_gradient, batch.ids, batch.weights, order, bag_of, starts, entry_of_chunk),
            *(chunk_numbers, entry_of, d.entries, batch.flat_starts),
            *(d.groups.index(group), num_bags, n, d.columns, stride),
            **group.kernel._asdict(),
            TARGET=target,
            OUT_ALIGN=_out_align(d),
            POOLED=batch.pooled,
            WEIGHTED=batch.weights is not None,
            **tile,
        )
    of_rows = (sums, keys, chunk_numbers, stride, n, no_key, width)
    fixed = {"CHUNK": cuts.chunk, "SUPER": cuts.super, **_tile(width)}
    if num_cuts > cuts.super:
        sum_supers[(triton.cdiv(num_cuts, cuts.super) - 1,)](*of_rows, **fixed)
    if num_cuts > 1:
        sum_runs[(num_cuts - 1,)](*of_rows, **fixed)
    return RowSums(sums, rows, weight_of_chunk)


def _targets(d: Descriptors, number: int) -> list[tuple[Group, int]]:
    return [(g, target) for g in d.groups if (target := g.target(number)) is not None]


def _only_fields(group: Group, *names: str) -> dict[str, Any]:
    return {name: getattr(group.kernel, name) for name in names}


def _only(d: Descriptors, number: int, wanted: tuple[bool, ...]) -> Tensor:
    """``entry_of`` without the tables whose partition ``number`` is not wanted."""
    keep: list[bool] = []
    index = 0
    for of in d.tables:
        own = wanted[index : index + len(of.widths)]
        index += len(of.widths)
        keep += [number < len(own) and own[number]] * of.num_features
    mask = on_device(keep, torch.bool, d.entries.device)
    return torch.where(mask, d.entry_of[number], -1)


class Steps(NamedTuple):
    """Per weight: its rule, up to three states, the dense gradient to write, the mask to mark, and its numbers."""

    rules: list[int]
    states: list[list[Tensor]]
    dense: list[Tensor]
    touched: list[Tensor]
    numbers: list[float]


class _StepKernel(NamedTuple):
    RULE: int
    WIDTH: int
    TYPE: int
    ALIGN: int
    STATE_ALIGN: int


def step_weights(weights: list[Tensor], row_sums: list[RowSums], steps: Steps) -> None:
    """Steps every row of ``row_sums`` once; writes its dense gradient, and marks it, if there is memory for that."""
    device = weights[0].device
    kernels: list[_StepKernel] = []
    numbers: list[int] = []
    for i, w in enumerate(map(Stored.of, weights)):
        addresses = [t.data_ptr() for t in (*steps.states[i], steps.dense[i]) if t.numel()]
        state_align = gcd(WIDEST_READ, *addresses)
        kernel = _StepKernel(steps.rules[i], w.width, TYPES[w.dtype], w.alignment, state_align)
        if kernel not in kernels:
            kernels.append(kernel)
        numbers += [w.address, w.row_stride, kernels.index(kernel)]
        numbers += [_address(steps.dense[i]), _address(steps.touched[i]) if steps.touched else 0]
        numbers += [s.data_ptr() for s in steps.states[i]] + [0] * (3 - len(steps.states[i]))
    described = _described(tuple(numbers), device, stream_of(device))
    hyper = on_device(steps.numbers or [0.0] * (7 * len(weights)), torch.float32, device)
    for own in row_sums:
        for group, kernel in enumerate(kernels):
            tile = _tile(kernel.WIDTH)
            step_rows[(triton.cdiv(own.rows.numel(), tile["LANES"]),)](
                *(own.rows, own.weights, own.sums, described, hyper, group, own.rows.numel(), own.sums.stride(0)),
                **kernel._asdict(),
                GRADIENT_ALIGN=gcd(WIDEST_READ // 4, own.sums.stride(0)),
                **tile,
            )


# The stream is part of the key here too. Replicated partitions are stepped on the streams of a pool, in turn.
@lru_cache(maxsize=4096)
def _described(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return on_device(list(numbers), torch.int64, device)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0
