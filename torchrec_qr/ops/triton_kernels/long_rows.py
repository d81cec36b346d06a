"""Sums of rows whose ids lie in several ranges: levels 2 and 3 of `sums`."""

import triton
import triton.language as tl

from .id_rows import ENTRY_FIELDS, GROUP, KEY_BASE, PARTITION_FIELDS, PARTITIONS, ROWS, WEIGHT_INDEX
from .launcher import kernel
from .occurrences import BLOCK_RANGES, positions_of_range, table_of_block
from .steps import STEP_GROUP, WEIGHT_FIELDS
from .sums import SUMS_ALIGN, finish_row


@triton.jit
def add_heads(total, heads, columns, first, end, STEP: tl.constexpr, sums_stride, width, LANES: tl.constexpr):
    """Adds every STEP-th head from ``first`` to before ``end`` to ``total`` (LANES, columns)."""
    for i in range(tl.cdiv(end - first, STEP * LANES)):
        of_range = first + (i * LANES + tl.arange(0, LANES)) * STEP
        at = tl.multiple_of(of_range.to(tl.int64) * sums_stride, SUMS_ALIGN)
        mask = (of_range < end)[:, None] & (columns < width)[None, :]
        total += tl.load(heads + (at[:, None] + columns[None, :]), mask=mask, other=0.0)
    return total


@kernel("num_tables sums_stride width")
def sum_supers(
    heads,
    keys,
    first_block,
    first_id,
    failure,
    num_tables,
    sums_stride,
    width,
    CHUNK: tl.constexpr,
    SUPER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (supers, 1); one whose ranges, and the next, all have heads of one row is summed."""
    if tl.load(failure) < 0:
        return
    first = tl.program_id(0) * SUPER
    block = first // BLOCK_RANGES
    if block >= tl.load(first_block + num_tables):
        return
    table = table_of_block(first_block, block, num_tables)
    begin, end, start = positions_of_range(first_block, first_id, table, first, CHUNK)
    after = start + SUPER * CHUNK
    if (start == begin) | (after >= end):
        return
    key = tl.load(keys + start)
    if (tl.load(keys + start - 1) != key) | (tl.load(keys + after) != key):
        return
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    total = add_heads(total, heads, columns, first, first + SUPER, 1, sums_stride, width, LANES)
    tl.store(heads + first.to(tl.int64) * sums_stride + columns, tl.sum(total, axis=0), mask=columns < width)


@kernel("group step_group num_tables sums_stride by_key")
def sum_long_rows(
    heads,
    tails,
    sums,
    rows,
    weight_of_row,
    keys,
    entries,
    entry_of,
    first_block,
    first_id,
    failure,
    weights,
    numbers,
    group,
    step_group,
    num_tables,
    sums_stride,
    by_key,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    TARGET: tl.constexpr,
    LAST: tl.constexpr,
    RULE: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    STATE_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    SUPER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (ranges, 1). One that ends within a row that began in it sums all of that row."""
    if tl.load(failure) < 0:
        return
    of_range = tl.program_id(0)
    block = of_range // BLOCK_RANGES
    if block >= tl.load(first_block + num_tables):
        return
    table = table_of_block(first_block, block, num_tables)
    begin, end, start = positions_of_range(first_block, first_id, table, of_range, CHUNK)
    after = start + CHUNK
    if after >= end:
        return
    key = tl.load(keys + after)
    if tl.load(keys + after - 1) != key:
        return
    if start > begin:
        if tl.load(keys + start - 1) == key:
            return
    e = tl.load(entry_of + table)
    if e < 0:
        return
    entry = entries + e.to(tl.int64) * ENTRY_FIELDS
    if tl.load(entry + GROUP) != group:
        return
    target = entry + PARTITIONS + TARGET * PARTITION_FIELDS
    number = tl.load(target + WEIGHT_INDEX)
    weight = weights + number * WEIGHT_FIELDS
    if LAST:
        if tl.load(weight + STEP_GROUP) != step_group:
            return
    row = key.to(tl.int64) - tl.load(target + KEY_BASE)
    if row >= tl.load(target + ROWS):
        return
    # The row's last position, by bisection: keys are sorted.
    last = after
    beyond = end
    while beyond - last > 1:
        middle = (last + beyond) // 2
        same = tl.load(keys + middle) == key
        last = tl.where(same, middle, last)
        beyond = tl.where(same, beyond, middle)
    first_head = of_range + 1
    last_head = of_range + (last - start) // CHUNK
    # Supers [a, b) have been summed; before and after them heads are single.
    a = tl.cdiv(first_head, SUPER) * SUPER
    b = last_head // SUPER * SUPER
    if b <= a:
        a = last_head + 1
        b = last_head + 1
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    total = add_heads(total, heads, columns, first_head, a, 1, sums_stride, WIDTH, LANES)
    total = add_heads(total, heads, columns, a, b, SUPER, sums_stride, WIDTH, LANES)
    total = add_heads(total, heads, columns, b, last_head + 1, 1, sums_stride, WIDTH, LANES)
    tail = tl.load(tails + of_range.to(tl.int64) * sums_stride + columns, mask=columns < WIDTH, other=0.0)
    one = tl.arange(0, 1)
    finish_row(
        (tail + tl.sum(total, axis=0))[None, :],
        row + one,
        last + one,
        key.to(tl.int64) + one,
        one == 0,
        columns,
        sums,
        rows,
        weight_of_row,
        weight,
        numbers,
        number,
        sums_stride,
        by_key,
        LAST,
        RULE,
        WIDTH,
        TYPE,
        WEIGHT_ALIGN,
        STATE_ALIGN,
    )
