"""The ids of a batch as ranks send them: in range by the policy of their table, and as row codes of split rows."""

import triton
import triton.language as tl

from .id_rows import floor_divide, hashed_id, report
from .launcher import kernel

# Positions in a feature's descriptor, int64; each divisor with magic and shift.
POLICY = tl.constexpr(0)
NUM_IDS = tl.constexpr(1)
PER_ROW = tl.constexpr(4)  # of codes: see `torchrec_qr.ops.description.CodeLayout`; 0: ids are sent
STRIDE = tl.constexpr(5)  # 0: rows are those of the map
SIZE = tl.constexpr(8)
CLASS_MAP = tl.constexpr(11)  # (S,) of the base partition
IS_WIDE = tl.constexpr(12)  # whether the map is int64
HASH_OFFSET = tl.constexpr(13)  # of the hash of ids: see `torchrec_qr.id_hash`
FEATURE_FIELDS = tl.constexpr(14)
# Policies: `torchrec_qr.ids`, and the hash in place of one.
UNCHECKED = tl.constexpr(0)
ERROR = tl.constexpr(1)
CLAMP = tl.constexpr(2)
WRAP = tl.constexpr(3)
HASHED = tl.constexpr(4)


@triton.jit
def code_of(x, feature, exists):
    """The row code of an id, and the id itself if the rows of its table are not split."""
    per_row = tl.load(feature + PER_ROW)
    stride = tl.load(feature + STRIDE)
    row = x * 0
    rest = x
    if stride > 0:
        quotient = floor_divide(x, feature + STRIDE, False)
        high = floor_divide(quotient, feature + SIZE, False)
        row = quotient - high * tl.load(feature + SIZE)
        rest = x - (quotient - high) * stride
    elif per_row > 0:
        address = tl.load(feature + CLASS_MAP)
        if tl.load(feature + IS_WIDE) != 0:
            row = tl.load(address.to(tl.pointer_type(tl.int64)) + x, mask=exists, other=0)
        else:
            row = tl.load(address.to(tl.pointer_type(tl.int32)) + x, mask=exists, other=0).to(tl.int64)
    return row * per_row + rest


@kernel("num_bags num_ids")
def send_ids(sent, failure, ids, offsets, features, num_bags, num_ids, BLOCK: tl.constexpr):
    """Writes what is sent of the ids of feature ``program_id(1)``; reports the least number of one that is refused."""
    number = tl.program_id(1)
    feature = features + number * FEATURE_FIELDS
    first = tl.maximum(tl.load(offsets + number * num_bags).to(tl.int64), 0)
    last = tl.minimum(tl.load(offsets + (number + 1) * num_bags).to(tl.int64), num_ids)
    at = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < last
    x = tl.load(ids + at, mask=exists, other=0).to(tl.int64)
    count = tl.load(feature + NUM_IDS)
    policy = tl.load(feature + POLICY)
    if policy == ERROR:
        report(failure, at, exists & ((x < 0) | (x >= count)))
    if policy == WRAP:
        x -= floor_divide(x, feature + NUM_IDS, False) * count
    elif policy == HASHED:
        x = hashed_id(x, tl.load(feature + HASH_OFFSET), feature + NUM_IDS)
    elif policy != UNCHECKED:
        x = tl.minimum(tl.maximum(x, 0), count - 1)
    tl.store(sent + at, code_of(x, feature, exists), mask=exists)
