"""Gradients of rows, summed over the ids that selected them, in three levels and without atomics; and their steps.

A row's ids lie side by side in the sorted order, from one id to nearly all of them: of a partition with 4 rows each has
a quarter, and strided over ids in order of frequency one row has nine tenths. Atomics would queue there, and one
program per row would leave the device idle. So units of work are ranges of positions, whatever the rows in them:

1. `sum_ranges`: a program walks LANES ranges of CHUNK positions at once. A row that begins and ends in a range, as most
   do, is done. Of others the range's share is kept: ``heads`` has that of a row that began before, ``tails`` that of a
   row that begins in the range and goes on.
2. `long_rows.sum_supers`: where SUPER consecutive ranges and the next have heads of one row, the first head becomes
   their sum.
3. `long_rows.sum_long_rows`: one program per row that begins in a range and goes on adds its tail, its supers and up to
   2 · SUPER heads beside them.

The sum of a row is stepped at once if the partition is *last*: no other program reads its rows then. The sums of the
other partitions, which are small, wait in ``sums``, because gradients are of the values before the step.

The order of additions follows from the order of ids alone: the same input gives the same bits.
"""

import triton
import triton.language as tl

from .id_rows import (
    ENTRY_FIELDS,
    GROUP,
    KEY_BASE,
    OFFSET,
    PARTITION_FIELDS,
    PARTITIONS,
    ROWS,
    WEIGHT_INDEX,
    load_rows,
)
from .launcher import kernel
from .occurrences import BLOCK_RANGES, keys_of, positions_of_range, table_of_block
from .steps import STEP_GROUP, WEIGHT_FIELDS, step_described

# Rows of ``sums``, ``heads`` and ``tails`` begin at multiples of so many floats.
SUMS_ALIGN = tl.constexpr(4)


@triton.jit
def widened(key):
    """A key in 32 bits or, if it has 64, in these."""
    if key.dtype == tl.int64:
        return key
    else:
        return key.to(tl.int32)


@triton.jit
def key_of_other(n, exists, keys_0, keys_1, keys_2, keys_3, J: tl.constexpr, TARGET: tl.constexpr):
    """The keys of ids n in the J-th partition of those that are not TARGET."""
    of_ids = keys_of(keys_0, keys_1, keys_2, keys_3, J + (J >= TARGET))
    return widened(tl.load(of_ids + n, mask=exists, other=0))


@triton.jit
def keys_of_others(
    n, exists, keys_0, keys_1, keys_2, keys_3, K: tl.constexpr, TARGET: tl.constexpr, MULT: tl.constexpr
):
    """The keys of ids n in the up to three partitions whose rows are multiplied with the gradient."""
    first = n
    second = n
    third = n
    if MULT:
        if K > 1:
            first = key_of_other(n, exists, keys_0, keys_1, keys_2, keys_3, 0, TARGET)
        if K > 2:
            second = key_of_other(n, exists, keys_0, keys_1, keys_2, keys_3, 1, TARGET)
        if K > 3:
            third = key_of_other(n, exists, keys_0, keys_1, keys_2, keys_3, 2, TARGET)
    return first, second, third


@triton.jit
def load_keyed_rows(
    key, entry, mask, columns, J: tl.constexpr, TARGET: tl.constexpr, TYPES: tl.constexpr, ALIGN: tl.constexpr
):
    """The rows of keys in the J-th partition of those that are not TARGET."""
    number: tl.constexpr = J + (J >= TARGET)
    base = tl.load(entry + PARTITIONS + number * PARTITION_FIELDS + KEY_BASE)
    return load_rows(key - base.to(key.dtype), entry, mask, columns, number, TYPES, ALIGN)


@triton.jit
def finish_row(
    total,
    row,
    position,
    key,
    done,
    columns,
    sums,
    rows,
    weight_of_row,
    weight,
    numbers,
    number,
    sums_stride,
    by_key,
    LAST: tl.constexpr,
    RULE: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    STATE_ALIGN: tl.constexpr,
):
    """Steps the rows whose lanes are ``done`` by ``total``, if LAST, or keeps their sums.

    They are kept in the order of keys if ``by_key``, which takes fewer rows than there are ids, else at the row's last
    position.
    """
    if LAST:
        step_described(total, row, done, columns, weight, numbers, number, RULE, WIDTH, TYPE, WEIGHT_ALIGN, STATE_ALIGN)
    else:
        slot = tl.where(by_key != 0, key.to(tl.int64), position.to(tl.int64))
        row = row.to(tl.int64)
        to = tl.multiple_of(slot * sums_stride, SUMS_ALIGN)[:, None] + columns[None, :]
        tl.store(sums + to, total, mask=done[:, None] & (columns < WIDTH)[None, :])
        tl.store(rows + slot, row, mask=done)
        tl.store(weight_of_row + slot, (number + slot * 0).to(tl.int32), mask=done)


@kernel("group step_group num_tables sums_stride by_key")
def sum_ranges(
    heads,
    tails,
    sums,
    rows,
    weight_of_row,
    out_gradient,
    keys,
    order,
    keys_0,
    keys_1,
    keys_2,
    keys_3,
    starts,
    id_weights,
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
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
    ALIGN: tl.constexpr,
    MULT: tl.constexpr,
    TARGET: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LAST: tl.constexpr,
    RULE: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    STATE_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of a row is Σ_{its ids x} w_x · gradient of x's bag, and of mult ⊙ Π_{j ≠ TARGET} W_j[row_j(x)].

    Grid: (groups of LANES ranges, 1); of those, the ones whose table is of one group of entries and of one of steps.
    ``entry_of`` (T,): the entry of each table that has the partition, or -1.
    """
    if tl.load(failure) < 0:  # offsets that are none
        return
    first_range = tl.program_id(0) * LANES
    block = first_range // BLOCK_RANGES
    if block >= tl.load(first_block + num_tables):
        return
    table = table_of_block(first_block, block, num_tables)
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
    offset = tl.load(entry + OFFSET)
    begin, end, first_start = positions_of_range(first_block, first_id, table, first_range, CHUNK)
    of_range = first_range + tl.arange(0, LANES)
    start = first_start + tl.arange(0, LANES) * CHUNK
    columns = tl.arange(0, BLOCK_D)
    has_column = (columns < WIDTH)[None, :]
    own = tl.multiple_of(of_range.to(tl.int64) * sums_stride, SUMS_ALIGN)[:, None] + columns[None, :]
    exists = start < end
    key = widened(tl.load(keys + start, mask=exists, other=0))
    key_before = widened(tl.load(keys + start - 1, mask=exists & (start > begin), other=0))
    num_rows, base = tl.load(target + ROWS).to(key.dtype), tl.load(target + KEY_BASE).to(key.dtype)
    began_before = exists & (start > begin) & (key == key_before)
    goes_on = began_before & (start < begin)
    total = tl.zeros([LANES, BLOCK_D], tl.float32)
    # A step of the walk reads rows and gradients. The step before has read where they lie, and the one before that the
    # number of the id, so that no step waits for reads that follow from one another.
    n = tl.load(order + start, mask=exists, other=0).to(tl.int32)
    place = tl.load(starts + n, mask=exists, other=0)
    other_0, other_1, other_2 = keys_of_others(n, exists, keys_0, keys_1, keys_2, keys_3, K, TARGET, MULT)
    n = tl.load(order + start + 1, mask=start + 1 < end, other=0).to(tl.int32)
    for i in range(tl.minimum(CHUNK, end - first_start)):
        at = start + i
        row = key - base
        live = exists & (row < num_rows)
        mask = live[:, None] & has_column
        from_start = tl.multiple_of(place.to(tl.int64) * OUT_ALIGN + offset, OUT_ALIGN)
        gradient = tl.load(out_gradient + (from_start[:, None] + columns[None, :]), mask=mask, other=0.0)
        if MULT:
            if K > 1:
                gradient *= load_keyed_rows(other_0, entry, mask, columns, 0, TARGET, TYPES, ALIGN)
            if K > 2:
                gradient *= load_keyed_rows(other_1, entry, mask, columns, 1, TARGET, TYPES, ALIGN)
            if K > 3:
                gradient *= load_keyed_rows(other_2, entry, mask, columns, 2, TARGET, TYPES, ALIGN)
        if WEIGHTED:
            of_id = tl.load(order + at, mask=live, other=0)
            gradient *= tl.load(id_weights + of_id, mask=live, other=0.0)[:, None]
        exists = at + 1 < end
        key_after = widened(tl.load(keys + at + 1, mask=exists, other=0))
        place = tl.load(starts + n, mask=exists, other=0)
        other_0, other_1, other_2 = keys_of_others(n, exists, keys_0, keys_1, keys_2, keys_3, K, TARGET, MULT)
        n = tl.load(order + at + 2, mask=at + 2 < end, other=0).to(tl.int32)
        total += gradient
        goes_on = live & exists & (key == key_after)
        ends = live & (goes_on == 0)
        if tl.max(ends.to(tl.int32), axis=0) > 0:
            tl.store(heads + own, total, mask=(ends & began_before)[:, None] & has_column)
            finish_row(
                total,
                row,
                at,
                key,
                ends & (began_before == 0),
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
                (TYPES >> (2 * TARGET)) & 3,
                WEIGHT_ALIGN,
                STATE_ALIGN,
            )
            total = tl.where(ends[:, None], 0.0, total)
        began_before = began_before & goes_on
        key = key_after
    tl.store(heads + own, total, mask=(goes_on & began_before)[:, None] & has_column)
    tl.store(tails + own, total, mask=(goes_on & (began_before == 0))[:, None] & has_column)
