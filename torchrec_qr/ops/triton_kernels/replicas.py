"""The step of replicas, by gradients of all their rows that every rank has after a reduction."""

import triton.language as tl

from .launcher import kernel
from .steps import STEP_GROUP, WEIGHT_FIELDS, step_described

# Positions in a replica's descriptor, int64; addresses are those of the device.
ROWS = tl.constexpr(0)
GRADIENT = tl.constexpr(1)  # (R_j, D_j) begins so many floats after ``gradients_of_replicas``
LOOKED_UP = tl.constexpr(2)  # (R_j,) begins so many bytes after ``looked_up``
MASK = tl.constexpr(3)  # (R_j,) uint8, of the rows that this rank has looked up since the last step
REPLICA_FIELDS = tl.constexpr(4)


@kernel("step_group")
def step_replicas(
    replicas,
    gradients_of_replicas,
    looked_up,
    weights,
    numbers,
    step_group,
    RULE: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    STATE_ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    GRADIENT_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Steps the rows of replica ``program_id(1)`` that have been looked up, or have a gradient that is not zero.

    ``gradients_of_replicas`` (fp32) and ``looked_up`` begin where those of the first replica do. ``looked_up`` (uint8,
    if MASKED) is not 0 where any rank has looked up a row. GRADIENT_ALIGN: of the gradients of all, in bytes.
    Weights of other groups (rule, width, type) are left to their own launches.
    """
    number = tl.program_id(1)
    weight = weights + number * WEIGHT_FIELDS
    replica = replicas + number * REPLICA_FIELDS
    first = tl.program_id(0).to(tl.int64) * LANES
    num_rows = tl.load(replica + ROWS)
    if (tl.load(weight + STEP_GROUP) == step_group) & (first < num_rows):
        row = first + tl.arange(0, LANES)
        has_row = row < num_rows
        columns = tl.arange(0, BLOCK_D)
        mask = has_row[:, None] & (columns < WIDTH)[None, :]
        begin = tl.multiple_of(row * WIDTH, WIDTH & -WIDTH)
        after = tl.multiple_of(tl.load(replica + GRADIENT), GRADIENT_ALIGN // 4)
        of_replica = tl.multiple_of(gradients_of_replicas, GRADIENT_ALIGN) + after
        gradient = tl.load(of_replica + (begin[:, None] + columns[None, :]), mask=mask, other=0.0)
        if MASKED:
            of_rows = looked_up + tl.load(replica + LOOKED_UP) + row
            has_row &= tl.load(of_rows, mask=has_row, other=0) != 0
            own = tl.load(replica + MASK).to(tl.pointer_type(tl.uint8))
            tl.store(own + row, (row * 0).to(tl.uint8), mask=has_row)
        else:
            has_row &= tl.max((gradient != 0).to(tl.int32), axis=1) > 0
        step_described(gradient, row, has_row, columns, weight, numbers, number, RULE, WIDTH, TYPE, ALIGN, STATE_ALIGN)
