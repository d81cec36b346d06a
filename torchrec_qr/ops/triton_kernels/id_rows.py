"""From ids to rows of partitions, in a kernel: fields of an entry's descriptor, and the arithmetic on them.

An *entry* is one feature of one table, or under ``concat`` one partition of it: K rows of one width that are
multiplied or added, and the columns of the output that they fill. `device_tables` writes the descriptors.

NARROW: all ids of the tables and all their rows are below 2^31, so that 32 bits hold them. Their arithmetic then takes
a quarter of the instructions, of which a forward has more than of reads and writes.
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
OFFSET = tl.constexpr(14)  # columns of the table's output before those of the entry
HASH_OFFSET = tl.constexpr(15)  # of the hash of ids: see `torchrec_qr.id_hash`
NUM_IDS = tl.constexpr(16)  # S, with magic and shift
PARTITIONS = tl.constexpr(19)  # where the K partitions begin
# Positions in a partition's part of a descriptor.
WEIGHT = tl.constexpr(0)
ROWS = tl.constexpr(1)
ROW_STRIDE = tl.constexpr(2)
DIVISOR = tl.constexpr(3)
MODULUS = tl.constexpr(6)
FIRST_ROW = tl.constexpr(9)
CLASS_MAP = tl.constexpr(10)
KEY_BASE = tl.constexpr(11)  # see `occurrences`
WEIGHT_INDEX = tl.constexpr(12)
PARTITION_FIELDS = tl.constexpr(13)
ENTRY_FIELDS = tl.constexpr(71)

# A batch has one of these for a table: its ids, codes, or any integers, which are hashed.
IDS = tl.constexpr(0)
CODES = tl.constexpr(1)
HASHED = tl.constexpr(2)

# As many bytes as a thread reads at once. Memory that PyTorch allocates begins at a multiple.
WIDEST_READ = tl.constexpr(16)
# What `failure` holds where nothing failed; and the number of an id, in int32, that stands for none.
NO_FAILURE = tl.constexpr(2**63 - 1)
NO_ID = tl.constexpr(2**31 - 1)
# Offsets that are none are reported before ids that are none: `failure` takes the least number.
OFFSET_FAILURE = tl.constexpr(-(2**62))


@triton.jit
def floor_divide(x, divisor_field, NARROW: tl.constexpr):
    """x // d, d ≥ 1, by one multiplication (`device_tables.magic`): of any int64, negative x through ~(~x // d).

    NARROW: of an int32 that is not negative.
    """
    if NARROW:
        magic = tl.load(divisor_field + 1).to(tl.uint32)
        shift = tl.load(divisor_field + 2).to(tl.uint32)
        return (tl.umulhi(x.to(tl.uint32) << 1, magic) >> shift).to(tl.int32)
    else:
        magic = tl.load(divisor_field + 1).to(tl.uint64)
        shift = tl.load(divisor_field + 2).to(tl.uint64)
        sign = x >> 63
        twice = (x ^ sign).to(tl.uint64) << 1
        return (tl.umulhi(twice, magic) >> shift).to(tl.int64) ^ sign


@triton.jit
def hashed_id(x, hash_offset, num_ids_field):
    """The id in [0, S) that any int64 hashes to: `torchrec_qr.id_hash` has the formula."""
    z = x.to(tl.uint64) + hash_offset.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z ^= z >> 31
    half = (z >> 1).to(tl.int64)
    return half - floor_divide(half, num_ids_field, False) * tl.load(num_ids_field)


@triton.jit
def id_of(code, entry, GIVEN: tl.constexpr):
    """The id that a code stands for, or that what was given hashes to; a negative code is none and stays."""
    if GIVEN == HASHED:
        return hashed_id(code, tl.load(entry + HASH_OFFSET), entry + NUM_IDS)
    elif GIVEN == CODES:
        row = floor_divide(code, entry + PER_ROW, False)
        rest = code - row * tl.load(entry + PER_ROW)
        row += tl.load(entry + CODE_FIRST_ROW)
        stride = tl.load(entry + STRIDE)
        high = floor_divide(rest, entry + STRIDE, False)
        spread = rest - high * stride + stride * (row + tl.load(entry + SIZE) * high)
        return tl.where(code < 0, code, tl.where(stride == 0, rest, spread))
    else:
        return code


@triton.jit
def class_of(x, partition, is_id, MAP: tl.constexpr, NARROW: tl.constexpr):
    """The class of an id: computed, or read from a map of int32 (MAP 1) or int64 (2) where ``is_id``."""
    if MAP == 0:
        quotient = floor_divide(x, partition + DIVISOR, NARROW)
        modulus = tl.load(partition + MODULUS).to(x.dtype)
        return quotient - floor_divide(quotient, partition + MODULUS, NARROW) * modulus
    elif MAP == 1:
        class_map = tl.load(partition + CLASS_MAP).to(tl.pointer_type(tl.int32))
        return tl.load(class_map + x, mask=is_id, other=0).to(x.dtype)
    else:
        class_map = tl.load(partition + CLASS_MAP).to(tl.pointer_type(tl.int64))
        return tl.load(class_map + x, mask=is_id, other=0).to(x.dtype)


@triton.jit
def row_of(x, entry, J: tl.constexpr, is_id, MAP: tl.constexpr, NARROW: tl.constexpr):
    """Row of an id in partition J; NARROW: of ids in int32, in which the row is too."""
    partition = entry + PARTITIONS + J * PARTITION_FIELDS
    found = class_of(x, partition, is_id, MAP, NARROW)
    return found - tl.load(partition + FIRST_ROW).to(found.dtype)


@triton.jit
def is_id_of(x, entry):
    """Whether x is an id of the table."""
    return (x >= tl.load(entry + FIRST_ID)) & (x <= tl.load(entry + LAST_ID))


@triton.jit
def narrowed(x, is_id, NARROW: tl.constexpr):
    """x as `row_of` takes it: in int32 if NARROW, where what is no id is 0."""
    if NARROW:
        return tl.where(is_id, x, 0).to(tl.int32)
    else:
        return x


@triton.jit
def has_row(row, entry, J: tl.constexpr):
    return (row >= 0) & (row < tl.load(entry + PARTITIONS + J * PARTITION_FIELDS + ROWS).to(row.dtype))


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
    start = tl.multiple_of(
        row.to(tl.int64) * tl.load(partition + ROW_STRIDE), (ALIGN + 3) // 4 if TYPE == 0 else (ALIGN + 1) // 2
    )
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
def report_offsets(failure, number, failed):
    report(failure, number.to(tl.int64) + OFFSET_FAILURE, failed)


@triton.jit
def check_ends_of_offsets(offsets, failure, num_offsets, num_ids):
    """Reports a first offset that is not 0, and a last one that is not the number of ids."""
    is_last = tl.arange(0, 2)
    wrong = tl.load(offsets + is_last * num_offsets) != is_last * num_ids
    report_offsets(failure, is_last * (num_offsets - 1), wrong)


@triton.jit
def span_of_bag(offsets, index, exists, num_ids):
    """Positions [start, end), int32, of the ids of bag ``index``; and where offsets are wrong, which have no ids."""
    start = tl.load(offsets + index, mask=exists, other=0)
    end = tl.load(offsets + index + 1, mask=exists, other=0)
    wrong = (end < start) | (start < 0) | (end > num_ids)
    start = tl.where(wrong, 0, start).to(tl.int32)
    return start, tl.where(wrong, 0, end).to(tl.int32), wrong


@triton.jit
def spans(offsets, entry, lane, num_bags, num_ids, POOLED: tl.constexpr):
    """Per lane: the span of bag ``lane`` of the entry's feature or, not pooled, of its ``lane``-th id alone.

    Also the number of the first offset that is wrong, or NO_ID.
    """
    feature = tl.load(entry + FEATURE).to(tl.int32)
    if POOLED:
        index = feature * num_bags + lane
        start, end, wrong = span_of_bag(offsets, index, lane < num_bags, num_ids)
        return start, end, tl.where(wrong, index, NO_ID)
    else:
        first, last, wrong = span_of_bag(offsets, feature + lane * 0, lane >= 0, num_ids)
        start = first + tl.minimum(lane, last - first)  # no further, because a sum of large numbers would overflow
        return start, tl.minimum(start + 1, last), tl.where(wrong, feature, NO_ID)
