"""From ids to rows of partitions, in a kernel: fields of an entry's descriptor, and the arithmetic on them.

An *entry* is one feature of one table, or under ``concat`` one partition of it: K rows of one width that are
multiplied or added, and the columns of the output that they fill. `tables` writes the descriptors.

Kernels are not specialised to numbers that change from batch to batch: a batch of a new size would compile them anew.
"""

import triton
import triton.language as tl

# Positions in a descriptor, which is int64 throughout; addresses are those of the device.
FEATURE = tl.constexpr(0)
COLUMN = tl.constexpr(1)  # pooled: of its first column in a row of the output
FIRST_ID = tl.constexpr(2)
LAST_ID = tl.constexpr(3)
GROUP = tl.constexpr(4)
DIM = tl.constexpr(5)  # columns of the table's output, not pooled the distance between those of two ids
PER_ROW = tl.constexpr(6)  # of codes: see `torchrec_qr.ops.description.CodeLayout`; each divisor with magic and shift
STRIDE = tl.constexpr(9)
SIZE = tl.constexpr(12)
CODE_FIRST_ROW = tl.constexpr(13)
PARTITIONS = tl.constexpr(14)  # where the K partitions begin
# Positions in a partition's part of a descriptor.
WEIGHT = tl.constexpr(0)
ROWS = tl.constexpr(1)
ROW_STRIDE = tl.constexpr(2)
DIVISOR = tl.constexpr(3)
MODULUS = tl.constexpr(6)
FIRST_ROW = tl.constexpr(9)
CLASS_MAP = tl.constexpr(10)
KEY_BASE = tl.constexpr(11)  # of its rows among those of all tables' partitions of the same number
WEIGHT_INDEX = tl.constexpr(12)
PARTITION_FIELDS = tl.constexpr(13)
ENTRY_FIELDS = tl.constexpr(66)

# Offsets that are none are reported before ids that are none: `failure` takes the least number.
OFFSET_FAILURE = tl.constexpr(-(2**62))


@triton.jit
def floor_divide(x, divisor_field):
    """x // d of any int64, d ≥ 1, by one multiplication (`tables.magic`); negative x through ~(~x // d)."""
    magic = tl.load(divisor_field + 1).to(tl.uint64)
    shift = tl.load(divisor_field + 2).to(tl.uint64)
    sign = x >> 63
    twice = (x ^ sign).to(tl.uint64) << 1
    return (tl.umulhi(twice, magic) >> shift).to(tl.int64) ^ sign


@triton.jit
def id_of(code, entry, CODED: tl.constexpr):
    """The id that a code stands for; a negative code is none and stays."""
    if CODED:
        row = floor_divide(code, entry + PER_ROW)
        rest = code - row * tl.load(entry + PER_ROW)
        row += tl.load(entry + CODE_FIRST_ROW)
        stride = tl.load(entry + STRIDE)
        high = floor_divide(rest, entry + STRIDE)
        spread = rest - high * stride + stride * (row + tl.load(entry + SIZE) * high)
        return tl.where(code < 0, code, tl.where(stride == 0, rest, spread))
    else:
        return code


@triton.jit
def class_of(x, partition, is_id, MAP: tl.constexpr):
    """The class of an id: computed, or read from a map of int32 (MAP 1) or int64 (2) where ``is_id``."""
    if MAP == 0:
        quotient = floor_divide(x, partition + DIVISOR)
        return quotient - floor_divide(quotient, partition + MODULUS) * tl.load(partition + MODULUS)
    elif MAP == 1:
        class_map = tl.load(partition + CLASS_MAP).to(tl.pointer_type(tl.int32))
        return tl.load(class_map + x, mask=is_id, other=0).to(tl.int64)
    else:
        class_map = tl.load(partition + CLASS_MAP).to(tl.pointer_type(tl.int64))
        return tl.load(class_map + x, mask=is_id, other=0)


@triton.jit
def row_of(x, entry, J: tl.constexpr, is_id, MAP: tl.constexpr):
    """Row of an id in partition J."""
    partition = entry + PARTITIONS + J * PARTITION_FIELDS
    return class_of(x, partition, is_id, MAP) - tl.load(partition + FIRST_ROW)


@triton.jit
def is_id_of(x, entry):
    """Whether x is an id of the table."""
    return (x >= tl.load(entry + FIRST_ID)) & (x <= tl.load(entry + LAST_ID))


@triton.jit
def has_row(row, entry, J: tl.constexpr):
    return (row >= 0) & (row < tl.load(entry + PARTITIONS + J * PARTITION_FIELDS + ROWS))


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """An address as a pointer to fp32 (TYPE 0), fp16 (1) or bf16 (2), a multiple of ALIGN bytes."""
    if TYPE == 0:
        return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)
    elif TYPE == 1:
        return tl.multiple_of(address.to(tl.pointer_type(tl.float16)), ALIGN)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), ALIGN)


@triton.jit
def load_rows(row, entry, mask, columns, J: tl.constexpr, TYPES: tl.constexpr, ALIGN: tl.constexpr):
    """(lanes, columns) fp32: rows of partition J, zero where ``mask`` is not set.

    TYPES has two bits per partition. ALIGN: all rows begin at multiples of so many bytes, which lets a thread read
    that many at once. ``entry``: of all lanes, or one per lane.
    """
    TYPE: tl.constexpr = (TYPES >> (2 * J)) & 3
    partition = entry + PARTITIONS + J * PARTITION_FIELDS
    start = tl.multiple_of(row * tl.load(partition + ROW_STRIDE), (ALIGN + 3) // 4 if TYPE == 0 else (ALIGN + 1) // 2)
    address = tl.load(partition + WEIGHT)
    if address.type.is_block():
        weight = pointer_to(address, TYPE, ALIGN)[:, None]
    else:
        weight = pointer_to(address, TYPE, ALIGN)
    return tl.load(weight + (start[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def report(failure, number, failed):
    """Leaves the least of the numbers whose lanes have failed in ``failure``, for the host to find later."""
    tl.atomic_min(failure + number * 0, number, mask=failed, sem="relaxed")


@triton.jit
def span_of_bag(offsets, failure, index, exists, num_offsets, num_ids):
    """Positions [start, end) of the ids of bag ``index`` out of ``num_offsets``: within [0, N) whatever the offsets."""
    start = tl.load(offsets + index, mask=exists, other=0).to(tl.int64)
    end = tl.load(offsets + index + 1, mask=exists, other=0).to(tl.int64)
    wrong = (end < start) | (start < 0) | (end > num_ids) | ((index == 0) & (start != 0))
    wrong |= (index == num_offsets - 1) & (end != num_ids)
    report(failure, index.to(tl.int64) + OFFSET_FAILURE, exists & wrong)
    start = tl.minimum(tl.maximum(start, 0), num_ids)
    return start, tl.minimum(tl.maximum(end, start), num_ids)


@triton.jit
def spans(offsets, failure, entry, lane, num_bags, num_features, num_ids, POOLED: tl.constexpr):
    """Per lane: the span of bag ``lane`` of the entry's feature or, not pooled, of its ``lane``-th id alone."""
    feature = tl.load(entry + FEATURE)
    if POOLED:
        exists = lane < num_bags
        start, end = span_of_bag(offsets, failure, feature * num_bags + lane, exists, num_features * num_bags, num_ids)
        return start, tl.where(exists, end, start)
    else:
        first, last = span_of_bag(offsets, failure, feature + lane * 0, lane >= 0, num_features, num_ids)
        start = first + lane
        return start, tl.minimum(start + 1, last)
