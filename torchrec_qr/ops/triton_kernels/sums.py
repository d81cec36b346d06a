"""Gradients of rows, summed over the ids that selected them: a segmented sum in three levels, without atomics.

A row's ids lie side by side in the sorted order, from one id to nearly all of them: of a partition with 4 rows each has
a quarter, and strided over ids in order of frequency one row has nine tenths. Atomics would queue there, and one
program per row would leave the device idle. So no unit of work follows a row:

1. `sum_chunks`: rows are cut at every CHUNK-th position of the order, which gives at most (unique rows + N / CHUNK)
   chunks of at most CHUNK ids. A program sums LANES chunks at once. A row of one chunk, as most are, is done.
2. `sum_supers`: of a row that goes on, the chunks that begin at a cut, its *heads*, are one per cut. Where SUPER
   consecutive heads, up to the next, are of one row, one program sums them into the first of them.
3. `sum_runs`: one program per row that crosses a cut adds its supers and the up to 2 · SUPER heads beside them to its
   first chunk. With CHUNK = 32 and SUPER = 64 a row with 16 million ids takes 8 thousand additions there, LANES at a
   time; one of 50 thousand takes 23 and some heads.

The order of additions follows from the order of ids alone: the same input gives the same bits. The price over atomics
is sorting keys, of 4 bytes where they fit, next to rows of hundreds.
"""

import triton
import triton.language as tl

from .id_rows import COLUMN, DIM, ENTRY_FIELDS, GROUP, id_of, load_rows, row_of

# Rows of `sums` begin at multiples of so many floats.
SUMS_ALIGN = tl.constexpr(4)


@triton.jit(do_not_specialize=["group", "num_bags", "num_ids"])
def sum_chunks(
    sums,
    out_gradient,
    ids,
    id_weights,
    order,
    bag_of,
    starts,
    entry_of_chunk,
    chunk_numbers,
    entry_of,
    entries,
    flat_starts,
    group,
    num_bags,
    num_ids,
    out_stride,
    sums_stride,
    K: tl.constexpr,
    TARGET: tl.constexpr,
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
    """sums[c] = Σ_{ids x of chunk c} w_x · gradient of x's bag, and of mult ⊙ Π_{j ≠ TARGET} W_j[row_j(x)].

    Of the chunks of one group of entries; those of others are left to their own launches.
    """
    first_chunk = tl.program_id(0) * LANES
    num_chunks = tl.load(chunk_numbers + num_ids - 1)
    if first_chunk >= num_chunks:
        return
    chunk = first_chunk + tl.arange(0, LANES)
    columns = tl.arange(0, BLOCK_D)
    of_chunk = tl.load(entry_of_chunk + chunk, mask=chunk < num_chunks, other=-1)
    mine = of_chunk >= 0
    entry = entries + tl.where(mine, of_chunk, 0).to(tl.int64) * ENTRY_FIELDS
    mine &= tl.load(entry + GROUP) == group
    start = tl.load(starts + chunk, mask=mine, other=0)
    end = tl.load(starts + chunk + 1, mask=mine, other=0)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    for i in range(tl.max(end - start, axis=0)):
        live = start + i < end
        n = tl.load(order + start + i, mask=live, other=0)
        bag = tl.load(bag_of + n, mask=live, other=0)
        feature = bag // num_bags
        # Features of one table share its rows, and differ in their columns of the output.
        e = tl.load(entry_of + feature, mask=live, other=0).to(tl.int64)
        if POOLED:
            column = tl.load(entries + e * ENTRY_FIELDS + COLUMN)
            at = (bag - feature * num_bags).to(tl.int64) * out_stride + column
        else:
            at = n * tl.load(entry + DIM) + tl.load(flat_starts + e)
        at = tl.multiple_of(at, OUT_ALIGN)
        mask = live[:, None] & (columns < WIDTH)[None, :]
        gradient = tl.load(out_gradient + (at[:, None] + columns[None, :]), mask=mask, other=0.0)
        if MULT:
            x = id_of(tl.load(ids + n, mask=live, other=0).to(tl.int64), entry, CODED)
            for j in tl.static_range(K):
                if j != TARGET:
                    # Ids with a key have a row in every partition.
                    row = row_of(x, entry, j, live, MAP)
                    gradient *= load_rows(row, entry, mask, columns, j, TYPES, ALIGN)
        if WEIGHTED:
            gradient *= tl.load(id_weights + n, mask=live, other=0.0)[:, None]
        total += gradient
    to = tl.multiple_of(chunk.to(tl.int64) * sums_stride, SUMS_ALIGN)
    tl.store(sums + (to[:, None] + columns[None, :]), total, mask=mine[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def add_heads(
    total,
    sums,
    chunk_numbers,
    columns,
    first,
    end,
    STEP: tl.constexpr,
    sums_stride,
    width,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds the heads at every STEP-th cut from ``first`` to before ``end`` to ``total`` (LANES, columns)."""
    for i in range(tl.cdiv(end - first, STEP * LANES)):
        cut = first + (i * LANES + tl.arange(0, LANES)) * STEP
        head = tl.load(chunk_numbers + cut * CHUNK, mask=cut < end, other=1).to(tl.int64) - 1
        at = tl.multiple_of(head * sums_stride, SUMS_ALIGN)
        mask = (cut < end)[:, None] & (columns < width)[None, :]
        total += tl.load(sums + (at[:, None] + columns[None, :]), mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_ids", "no_key"])
def sum_supers(
    sums,
    keys,
    chunk_numbers,
    sums_stride,
    num_ids,
    no_key,
    width,
    CHUNK: tl.constexpr,
    SUPER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: supers but the first, whose first cut is no cut; one that one row fills, and goes on after, is summed."""
    first = (tl.program_id(0) + 1) * SUPER
    after = (first + SUPER) * CHUNK
    if after >= num_ids:
        return
    key = tl.load(keys + first * CHUNK)
    if key >= no_key:
        return
    if tl.load(keys + first * CHUNK - 1) != key:
        return
    if tl.load(keys + after) != key:
        return
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    total = add_heads(total, sums, chunk_numbers, columns, first, first + SUPER, 1, sums_stride, width, CHUNK, LANES)
    head = tl.load(chunk_numbers + first * CHUNK).to(tl.int64) - 1
    tl.store(sums + head * sums_stride + columns, tl.sum(total, axis=0), mask=columns < width)


@triton.jit(do_not_specialize=["num_ids", "no_key"])
def sum_runs(
    sums,
    keys,
    chunk_numbers,
    sums_stride,
    num_ids,
    no_key,
    width,
    CHUNK: tl.constexpr,
    SUPER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: cuts from 1. The first cut that a row crosses adds all its heads to the chunk that the row begins with."""
    cut = tl.program_id(0) + 1
    key = tl.load(keys + cut * CHUNK)
    if key >= no_key:
        return
    if tl.load(keys + cut * CHUNK - 1) != key:
        return
    if cut > 1:
        if tl.load(keys + (cut - 1) * CHUNK - 1) == key:
            return
    # The last cut that the row crosses, by bisection: keys are sorted.
    last = cut
    beyond = tl.cdiv(num_ids, CHUNK)
    while beyond - last > 1:
        middle = (last + beyond) // 2
        same = tl.load(keys + middle * CHUNK) == key
        last = tl.where(same, middle, last)
        beyond = tl.where(same, beyond, middle)
    # Supers [a, b) have been summed; before and after them heads are single.
    a = tl.cdiv(cut, SUPER) * SUPER
    b = last // SUPER * SUPER
    if b <= a:
        a = last + 1
        b = last + 1
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    total = add_heads(total, sums, chunk_numbers, columns, cut, a, 1, sums_stride, width, CHUNK, LANES)
    total = add_heads(total, sums, chunk_numbers, columns, a, b, SUPER, sums_stride, width, CHUNK, LANES)
    total = add_heads(total, sums, chunk_numbers, columns, b, last + 1, 1, sums_stride, width, CHUNK, LANES)
    to = sums + (tl.load(chunk_numbers + cut * CHUNK - 1).to(tl.int64) - 1) * sums_stride + columns
    tl.store(to, tl.load(to, mask=columns < width, other=0.0) + tl.sum(total, axis=0), mask=columns < width)
