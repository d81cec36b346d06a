"""Kernels that read K rows per id: the forward, and the gradient of the ids' weights.

A program has a tile of LANES bags × BLOCK_D columns and walks all its bags at once, one id of each at a time, so that
a step of the walk has LANES · K rows under way. Rows are composed, weighted and added in registers: what is written
is the output alone. Where a bag is shorter than the longest of its tile, its lanes idle.
"""

import triton
import triton.language as tl

from .id_rows import COLUMN, DIM, ENTRY_FIELDS, has_row, id_of, is_id_of, load_rows, report, row_of, spans


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
):
    """(lanes, columns) fp32: the composed embedding of each id; and which ids have one, the others giving zeros."""
    found = is_id
    value = tl.zeros([x.shape[0], columns.shape[0]], tl.float32)
    for j in tl.static_range(K):
        row = row_of(x, entry, j, is_id, MAP)
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
        return tl.multiple_of(start * tl.load(entry + DIM) + tl.load(flat_starts + e), OUT_ALIGN)


@triton.jit(do_not_specialize=["first_entry", "num_bags", "num_features", "num_ids"])
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
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
    ALIGN: tl.constexpr,
    MULT: tl.constexpr,
    MAP: tl.constexpr,
    CODED: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    POOLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[bag] = Σ_{ids x of the bag} w_x · compose_j(W_j[row_j(x)]).

    Grid: (blocks of LANES bags, entries of one group).
    """
    e = first_entry + tl.program_id(1)
    entry = entries + e * ENTRY_FIELDS
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    columns = tl.arange(0, BLOCK_D)
    start, end = spans(offsets, failure, entry, lane, num_bags, num_features, num_ids, POOLED)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    for i in range(tl.max(end - start, axis=0)):
        n = start + i
        live = n < end
        x = id_of(tl.load(ids + n, mask=live, other=0).to(tl.int64), entry, CODED)
        value, found = composed_rows(x, live & is_id_of(x, entry), entry, columns, K, WIDTH, TYPES, ALIGN, MULT, MAP)
        report(failure, n, live & (found == 0))
        if WEIGHTED:
            value *= tl.load(id_weights + n, mask=live, other=0.0)[:, None]
        total += value
    if POOLED:
        written = lane < num_bags
    else:
        written = start < end
    to = output_start(entry, flat_starts, e, lane, start, out_stride, OUT_ALIGN, POOLED)
    tl.store(out + (to[:, None] + columns[None, :]), total, mask=written[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=["first_entry", "num_bags", "num_features", "num_ids"])
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
    CODED: tl.constexpr,
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
    start, end = spans(offsets, failure, entry, lane, num_bags, num_features, num_ids, POOLED)
    at = output_start(entry, flat_starts, e, lane, start, out_stride, OUT_ALIGN, POOLED)
    has_gradient = (start < end)[:, None] & (columns < WIDTH)[None, :]
    gradient = tl.load(out_gradient + (at[:, None] + columns[None, :]), mask=has_gradient, other=0.0)
    for i in range(tl.max(end - start, axis=0)):
        n = start + i
        live = n < end
        x = id_of(tl.load(ids + n, mask=live, other=0).to(tl.int64), entry, CODED)
        value, _ = composed_rows(x, live & is_id_of(x, entry), entry, columns, K, WIDTH, TYPES, ALIGN, MULT, MAP)
        product = tl.sum(value * gradient, axis=1)
        tl.store(of_ids + n, tl.load(of_ids + n, mask=live, other=0.0) + product, mask=live)
