"""Kernels that read K rows per id: the forward, and the gradient of the ids' weights.

A program has a tile of LANES bags × BLOCK_D columns and walks all its bags at once, one id of each at a time, so that
a step of the walk has LANES · K rows under way. Rows are composed, weighted and added in registers: what is written
is the output alone. Where a bag is shorter than the longest of its tile, its lanes idle.
"""

import triton
import triton.language as tl

from .id_rows import (
    COLUMN,
    DIM,
    ENTRY_FIELDS,
    NO_ID,
    check_ends_of_offsets,
    has_row,
    id_of,
    is_id_of,
    load_rows,
    narrowed,
    report,
    report_offsets,
    row_of,
    spans,
)
from .launcher import kernel


@triton.jit
def composed_rows(
    x,
    is_id,
    entry,
    columns,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
    ALIGN: tl.constexpr,
    MULT: tl.constexpr,
    MAP: tl.constexpr,
    NARROW: tl.constexpr,
):
    """(lanes, columns) fp32: the composed embedding of each id; and which ids have one, the others giving zeros."""
    found = is_id
    x = narrowed(x, is_id, NARROW)
    value = tl.zeros([x.shape[0], columns.shape[0]], tl.float32)
    for j in tl.static_range(K):
        row = row_of(x, entry, j, is_id, MAP, NARROW)
        here = is_id & has_row(row, entry, j)
        found &= here
        part = load_rows(row, entry, here[:, None] & (columns < WIDTH)[None, :], columns, j, TYPES, ALIGN)
        if j == 0:
            value = part
        elif MULT:
            value *= part
        else:
            value += part
    return tl.where(found[:, None], value, 0.0), found


@triton.jit
def output_start(entry, flat_starts, e, lane, start, out_stride, OUT_ALIGN: tl.constexpr, POOLED: tl.constexpr):
    """Where the output of each lane begins: its bag's columns or, not pooled, those of its id."""
    if POOLED:
        return tl.multiple_of(lane.to(tl.int64) * out_stride + tl.load(entry + COLUMN), OUT_ALIGN)
    else:
        return tl.multiple_of(start.to(tl.int64) * tl.load(entry + DIM) + tl.load(flat_starts + e), OUT_ALIGN)


@kernel("first_entry num_bags num_features num_ids out_stride tiles")
def forward(
    out,
    ids,
    offsets,
    id_weights,
    entries,
    flat_starts,
    failure,
    first_entry,
    num_bags,
    num_features,
    num_ids,
    out_stride,
    tiles,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
    ALIGN: tl.constexpr,
    MULT: tl.constexpr,
    MAP: tl.constexpr,
    GIVEN: tl.constexpr,
    NARROW: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    POOLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[bag] = Σ_{ids x of the bag} w_x · compose_j(W_j[row_j(x)]).

    Grid: (groups of ``tiles`` blocks of LANES bags, entries of one group).
    """
    e = first_entry + tl.program_id(1)
    entry = entries + e * ENTRY_FIELDS
    if (tl.program_id(0) == 0) & (e == 0):
        check_ends_of_offsets(offsets, failure, num_features * num_bags, num_ids)
    columns = tl.arange(0, BLOCK_D)
    lane = tl.program_id(0) * tiles * LANES + tl.arange(0, LANES)
    # Reported once, after the loops: an atomic operation in one would make every step read the descriptors again.
    first_failed = tl.full([LANES], NO_ID, tl.int32)
    start, end, wrong_offset = spans(offsets, entry, lane, num_bags, num_ids, POOLED)
    code = tl.load(ids + start, mask=start < end, other=0).to(tl.int64)
    for _ in range(tiles):
        # The next id, and the bags of the next tile, are read while rows are on their way.
        lane_after = lane + LANES
        start_after, end_after, wrong_after = spans(offsets, entry, lane_after, num_bags, num_ids, POOLED)
        wrong_offset = tl.minimum(wrong_offset, wrong_after)
        total = tl.zeros([LANES, BLOCK_D], tl.float32)
        for i in range(tl.max(end - start, axis=0)):
            n = start + i
            live = n < end
            x = id_of(code, entry, GIVEN)
            value, found = composed_rows(
                x, live & is_id_of(x, entry), entry, columns, K, WIDTH, TYPES, ALIGN, MULT, MAP, NARROW
            )
            code = tl.load(ids + n + 1, mask=n + 1 < end, other=0).to(tl.int64)
            first_failed = tl.minimum(first_failed, tl.where(live & (found == 0), n, NO_ID))
            if WEIGHTED:
                value *= tl.load(id_weights + n, mask=live, other=0.0)[:, None]
            total += value
        code = tl.load(ids + start_after, mask=start_after < end_after, other=0).to(tl.int64)
        if POOLED:
            written = lane < num_bags
        else:
            written = start < end
        to = output_start(entry, flat_starts, e, lane, start, out_stride, OUT_ALIGN, POOLED)
        tl.store(out + (to[:, None] + columns[None, :]), total, mask=written[:, None] & (columns < WIDTH)[None, :])
        lane = lane_after
        start = start_after
        end = end_after
    report_offsets(failure, wrong_offset, wrong_offset != NO_ID)
    report(failure, first_failed.to(tl.int64), first_failed != NO_ID)


@kernel("first_entry num_bags num_features num_ids out_stride")
def weights_gradient(
    of_ids,
    out_gradient,
    ids,
    offsets,
    entries,
    flat_starts,
    failure,
    first_entry,
    num_bags,
    num_features,
    num_ids,
    out_stride,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
    ALIGN: tl.constexpr,
    MULT: tl.constexpr,
    MAP: tl.constexpr,
    GIVEN: tl.constexpr,
    NARROW: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    POOLED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """of_ids[n] += scale · ⟨gradient of the bag, compose_j(W_j[row_j(x_n)])⟩; grid as `forward`.

    Added, since under ``concat`` every partition has its share: those of one table are launched one after the other.
    """
    e = first_entry + tl.program_id(1)
    entry = entries + e * ENTRY_FIELDS
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    columns = tl.arange(0, BLOCK_D)
    start, end, _wrong_offset = spans(offsets, entry, lane, num_bags, num_ids, POOLED)
    at = output_start(entry, flat_starts, e, lane, start, out_stride, OUT_ALIGN, POOLED)
    has_gradient = (start < end)[:, None] & (columns < WIDTH)[None, :]
    gradient = tl.load(out_gradient + (at[:, None] + columns[None, :]), mask=has_gradient, other=0.0)
    for i in range(tl.max(end - start, axis=0)):
        n = start + i
        live = n < end
        x = id_of(tl.load(ids + n, mask=live, other=0).to(tl.int64), entry, GIVEN)
        value, _ = composed_rows(
            x, live & is_id_of(x, entry), entry, columns, K, WIDTH, TYPES, ALIGN, MULT, MAP, NARROW
        )
        product = tl.sum(value * gradient, axis=1)
        tl.store(of_ids + n, tl.load(of_ids + n, mask=live, other=0.0) + product, mask=live)
