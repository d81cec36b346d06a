"""Which ids selected a row: kernels that give every id its keys, and cut the sorted keys into ranges.

The *key* of an id is its row among the rows, laid end to end, of one partition of every table. Behind the rows of each
table, and for tables that lack the partition, lies one key more, for its ids that have no row. So the keys of a table's
ids, sorted, fill the same positions as its ids: those between its offsets.

A *range* is CHUNK such positions of one table, and a *block* is BLOCK_RANGES of them. Each table begins with a block of
its own.
"""

import triton
import triton.language as tl

from .id_rows import (
    COLUMN,
    DIM,
    ENTRY_FIELDS,
    KEY_BASE,
    NO_ID,
    OFFSET,
    PARTITION_FIELDS,
    PARTITIONS,
    ROWS,
    check_ends_of_offsets,
    has_row,
    id_of,
    is_id_of,
    narrowed,
    report,
    report_offsets,
    row_of,
    spans,
)
from .launcher import kernel

BLOCK_RANGES = tl.constexpr(16)


@triton.jit
def keys_of(keys_0, keys_1, keys_2, keys_3, NUMBER: tl.constexpr):
    """The keys of partition NUMBER."""
    if NUMBER == 0:
        return keys_0
    elif NUMBER == 1:
        return keys_1
    elif NUMBER == 2:
        return keys_2
    else:
        return keys_3


@kernel("first_entry num_bags num_features num_ids out_stride")
def keys_of_ids(
    keys_0,
    keys_1,
    keys_2,
    keys_3,
    starts,
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
    PART: tl.constexpr,
    MAP: tl.constexpr,
    GIVEN: tl.constexpr,
    NARROW: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    POOLED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the keys of each id in the K partitions of its entry, the first of which has number PART.

    Also starts[n]: where the gradient of the output of id n begins, in units of OUT_ALIGN floats.

    Grid: (blocks of LANES bags, entries of one group).
    """
    e = first_entry + tl.program_id(1)
    entry = entries + e * ENTRY_FIELDS
    if (tl.program_id(0) == 0) & (e == 0):
        check_ends_of_offsets(offsets, failure, num_features * num_bags, num_ids)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    start, end, wrong_offset = spans(offsets, entry, lane, num_bags, num_ids, POOLED)
    offset = tl.load(entry + OFFSET)
    if POOLED:
        first_start = lane.to(tl.int64) * out_stride + (tl.load(entry + COLUMN) - offset)
        per_id = offset * 0
    else:
        first_start = lane.to(tl.int64) * 0 + (tl.load(flat_starts + e) - offset)
        per_id = tl.load(entry + DIM)
    first_failed = tl.full([LANES], NO_ID, tl.int32)
    for i in range(tl.max(end - start, axis=0)):
        n = start + i
        live = n < end
        x = id_of(tl.load(ids + n, mask=live, other=0).to(tl.int64), entry, GIVEN)
        is_id = live & is_id_of(x, entry)
        narrow = narrowed(x, is_id, NARROW)
        found = is_id
        for j in tl.static_range(K):
            row = row_of(narrow, entry, j, is_id, MAP, NARROW)
            found &= has_row(row, entry, j)
            base = tl.load(entry + PARTITIONS + j * PARTITION_FIELDS + KEY_BASE)
            to = keys_of(keys_0, keys_1, keys_2, keys_3, PART + j) + n
            tl.store(to, (base + row).to(to.dtype.element_ty), mask=is_id)
        for j in tl.static_range(K):
            partition = entry + PARTITIONS + j * PARTITION_FIELDS
            to = keys_of(keys_0, keys_1, keys_2, keys_3, PART + j) + n
            no_row = tl.load(partition + KEY_BASE) + tl.load(partition + ROWS)
            tl.store(to, (no_row + n * 0).to(to.dtype.element_ty), mask=live & (found == 0))
        at = starts + n
        tl.store(at, ((first_start + n.to(tl.int64) * per_id) // OUT_ALIGN).to(at.dtype.element_ty), mask=live)
        first_failed = tl.minimum(first_failed, tl.where(live & (found == 0), n, NO_ID))
    report_offsets(failure, wrong_offset, wrong_offset != NO_ID)
    report(failure, first_failed.to(tl.int64), first_failed != NO_ID)


@kernel("num_bags num_ids num_tables")
def blocks_of_tables(
    first_block,
    first_id,
    offsets,
    first_feature,
    num_bags,
    num_ids,
    num_tables,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Writes the block and the position that each of T tables begins with, and how many there are, (T + 1,) each.

    Grid: (1,). ``first_feature`` (T + 1,).
    """
    t = tl.arange(0, BLOCK_T)
    # Offsets that are none have been reported: here they may not lead out of the ids.
    begin = tl.load(offsets + tl.load(first_feature + t, mask=t <= num_tables, other=0) * num_bags).to(tl.int64)
    end = tl.load(offsets + tl.load(first_feature + t + 1, mask=t < num_tables, other=0) * num_bags).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), num_ids).to(tl.int32)
    end = tl.minimum(tl.maximum(end.to(tl.int32), begin), num_ids)
    blocks = tl.where(t < num_tables, tl.cdiv(end - begin, CHUNK * BLOCK_RANGES), 0)
    through = tl.cumsum(blocks, 0)
    tl.store(first_block + t, through - blocks, mask=t <= num_tables)
    tl.store(first_id + t, begin, mask=t <= num_tables)


@triton.jit
def positions_of_range(first_block, first_id, table, of_range, CHUNK: tl.constexpr):
    """The positions [begin, end) of a table's ids, and the first of a range of it."""
    begin, end = tl.load(first_id + table), tl.load(first_id + table + 1)
    return begin, end, begin + (of_range - tl.load(first_block + table) * BLOCK_RANGES) * CHUNK


@triton.jit
def table_of_block(first_block, block, num_tables):
    """The table that a block is of: the last of those that begin with it or before."""
    table = block * 0
    beyond = table + num_tables
    while beyond - table > 1:
        middle = (table + beyond) // 2
        begun = tl.load(first_block + middle) <= block
        table = tl.where(begun, middle, table)
        beyond = tl.where(begun, beyond, middle)
    return table
