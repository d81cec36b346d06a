"""Which ids selected a row: kernels that give every id its key, and cut the sorted keys into chunks.

The *key* of an id is its row among the rows, laid end to end, of one partition of every table; ids without one (out
of range, or of a table that has no such partition) have the number of keys, ``no_key``, which sorts last. A *chunk*
is a run of equal keys that crosses no multiple of CHUNK positions in the sorted order: see `sums`.
"""

import triton
import triton.language as tl

from .id_rows import (
    ENTRY_FIELDS,
    FEATURE,
    KEY_BASE,
    PARTITION_FIELDS,
    PARTITIONS,
    WEIGHT_INDEX,
    has_row,
    id_of,
    is_id_of,
    report,
    row_of,
    spans,
)


@triton.jit(do_not_specialize=["first_entry", "num_bags", "num_features", "num_ids"])
def keys_of_ids(
    keys,
    bag_of,
    ids,
    offsets,
    entries,
    entry_of,
    failure,
    first_entry,
    num_bags,
    num_features,
    num_ids,
    K: tl.constexpr,
    TARGET: tl.constexpr,
    MAP: tl.constexpr,
    CODED: tl.constexpr,
    POOLED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes keys[n], of partition TARGET, and bag_of[n] = feature · B + bag (not pooled: feature), per id.

    Grid: (blocks of LANES bags, entries of one group); of those, the ones that ``entry_of`` (F,) names.
    """
    e = first_entry + tl.program_id(1)
    entry = entries + e * ENTRY_FIELDS
    feature = tl.load(entry + FEATURE)
    if tl.load(entry_of + feature) != e:
        return
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    start, end = spans(offsets, failure, entry, lane, num_bags, num_features, num_ids, POOLED)
    target = entry + PARTITIONS + TARGET * PARTITION_FIELDS
    base = tl.load(target + KEY_BASE)
    bag = feature + lane * 0
    if POOLED:
        bag = feature * num_bags + lane
    for i in range(tl.max(end - start, axis=0)):
        n = start + i
        live = n < end
        x = id_of(tl.load(ids + n, mask=live, other=0).to(tl.int64), entry, CODED)
        is_id = live & is_id_of(x, entry)
        key = x * 0
        found = is_id
        for j in tl.static_range(K):
            row = row_of(x, entry, j, is_id, MAP)
            found &= has_row(row, entry, j)
            if j == TARGET:
                key = base + row
        report(failure, n, live & (found == 0))
        tl.store(keys + n, key, mask=found)
        tl.store(bag_of + n, bag, mask=live)


@triton.jit(do_not_specialize=["num_bags", "num_ids", "no_key"])
def chunks_of_keys(
    starts,
    rows,
    entry_of_chunk,
    weight_of_chunk,
    keys,
    chunk_numbers,
    order,
    bag_of,
    entry_of,
    target_of,
    entries,
    num_bags,
    num_ids,
    no_key,
    BLOCK: tl.constexpr,
):
    """Per chunk: where it starts in the sorted order, its entry and weight, and its row if it is the first of a key.

    ``chunk_numbers`` (N,): of the chunk that each position lies in, from 1. What is not written stays as the caller
    made it: starts N, rows and entries -1.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < num_ids
    number = tl.load(chunk_numbers + i, mask=exists, other=0)
    before = tl.load(chunk_numbers + i - 1, mask=exists & (i > 0), other=0)
    is_start = exists & (number != before)
    chunk = number - 1
    tl.store(starts + chunk, i, mask=is_start)
    key = tl.load(keys + i, mask=is_start, other=0)
    key_before = tl.load(keys + i - 1, mask=is_start & (i > 0), other=-1)
    has_key = is_start & (key < no_key)
    bag = tl.load(bag_of + tl.load(order + i, mask=has_key, other=0), mask=has_key, other=0)
    feature = bag // num_bags
    e = tl.load(entry_of + feature, mask=has_key, other=0)
    target = entries + e.to(tl.int64) * ENTRY_FIELDS + PARTITIONS
    target += tl.load(target_of + feature, mask=has_key, other=0) * PARTITION_FIELDS
    row = key.to(tl.int64) - tl.load(target + KEY_BASE, mask=has_key, other=0)
    tl.store(rows + chunk, row, mask=has_key & (key != key_before))
    tl.store(entry_of_chunk + chunk, e, mask=has_key)
    tl.store(weight_of_chunk + chunk, tl.load(target + WEIGHT_INDEX, mask=has_key, other=0), mask=has_key)
