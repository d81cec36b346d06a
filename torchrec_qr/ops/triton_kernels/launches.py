"""A lookup: the launches of its forward. Nothing here waits for the device."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import id_rows, steps
from .device_tables import Descriptors, on_device
from .forward import forward, weights_gradient
from .launcher import launch
from .occurrences import BLOCK_RANGES

NO_FAILURE, OFFSET_FAILURE = id_rows.NO_FAILURE.value, id_rows.OFFSET_FAILURE.value
NOTHING, ADAM = steps.NOTHING.value, steps.ADAM.value
_MOST_IDS = 2**31 - 2**16  # positions of 32 bits, beyond which a program may have a few thousand more


class Batch(NamedTuple):
    """ids (N,), offsets (F·B + 1,) if ``pooled`` else (F + 1,), weights (N,) fp32 or None: contiguous, on the device.

    flat_starts: not pooled, per entry s: its columns of id n begin at s + n · D in the output. failure: see `report` in
    `id_rows`.
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
    if n > _MOST_IDS or offsets.numel() > _MOST_IDS:
        raise ValueError(f"{n} ids in {offsets.numel() - 1} bags; allowed: at most {_MOST_IDS} of either")
    flat_starts, most_ids = d.parts, n
    shape: tuple[int, ...] = ((offsets.numel() - 1) // d.num_features, d.columns)
    if not pooled:
        if d.dim is not None:
            shape = (n * d.dim,)
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


class Tile(NamedTuple):
    """The rows and columns of a program, and its warps."""

    lanes: int
    block_d: int
    warps: int


# Numbers of a warp's tile, 8 per thread: two reads of 16 bytes. On an H100 one warp with two rows of 128 columns took
# 0.72 to 0.81 of the time of one with four, and less than several warps with more.
_TILE = 256

# A program of several tiles reads the descriptors once. More programs than so many are more than a device holds.
_MOST_TILES, _MANY_PROGRAMS = 8, 4096


def tile_of(width: int) -> Tile:
    """Returns a tile of at most 16 lanes, the ranges of a block.

    Triton 3.6.0 and 3.7.1 fail to compile a loop over more rows of few columns for some tables, because a pass that
    removes conversions of layouts leaves a load with a mask of another layout.
    """
    block = triton.next_power_of_2(width)
    lanes = max(1, min(BLOCK_RANGES.value, _TILE // block))
    return Tile(lanes, block, max(1, lanes * block // _TILE))


def warps_of(tile: Tile, num_partitions: int, rule: int = NOTHING) -> int:
    """Returns the warps of a program: twice those of the tile where one would take more than 96 registers a thread.

    Args:
        tile: of the program.
        num_partitions: K, of which it holds a row each.
        rule: of its step, with up to three states of a row.
    """
    return tile.warps * 2 if num_partitions > 2 or rule >= ADAM else tile.warps


def blocks_of(lanes: int, batch: Batch, d: Descriptors) -> int:
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
        tile = tile_of(group.kernel.WIDTH)
        blocks = blocks_of(tile.lanes, batch, d)
        tiles = max(1, min(_MOST_TILES, blocks * group.size // _MANY_PROGRAMS))
        of_batch = (batch.ids, batch.offsets, batch.weights, d.entries, batch.flat_starts, batch.failure)
        sizes = (group.first, batch.num_bags(d), d.num_features, batch.ids.numel(), d.columns, tiles)
        fixed = (*group.kernel, d.out_align, batch.pooled, batch.weights is not None, tile.lanes, tile.block_d)
        grid = (triton.cdiv(blocks, tiles), group.size)
        launch(forward, grid, (out, *of_batch, *sizes), fixed, warps_of(tile, group.kernel.K))
    return out


def gradient_of_weights(d: Descriptors, batch: Batch, out_gradient: Tensor) -> Tensor:
    """Returns (N,) fp32: the gradient of the ids' weights."""
    of_ids = torch.zeros(batch.ids.shape, device=d.entries.device)
    for group in d.groups:
        tile = tile_of(group.kernel.WIDTH)
        of_batch = (batch.ids, batch.offsets, d.entries, batch.flat_starts, batch.failure)
        sizes = (group.first, batch.num_bags(d), d.num_features, batch.ids.numel(), d.columns)
        fixed = (*group.kernel, d.out_align, batch.pooled, tile.lanes, tile.block_d)
        grid = (blocks_of(tile.lanes, batch, d), group.size)
        launch(weights_gradient, grid, (of_ids, out_gradient, *of_batch, *sizes), fixed, warps_of(tile, group.kernel.K))
    return of_ids
