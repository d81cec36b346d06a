"""One exact step of an optimizer per row, from its summed gradient.

Formulas: `torchrec_qr.distributed.fused_params`. In fp32; weights of fp16 and bf16 are rounded to the nearest, once.
Only rows with a gradient move, and their state.
Kernels of a rule without weight decay are compiled without it: see `torchrec_qr.ops.update_rules.DECAYS`.
"""

import triton
import triton.language as tl

from .id_rows import pointer_to
from .launcher import kernel

# Positions in a weight's descriptor, int64.
WEIGHT = tl.constexpr(0)
ROW_STRIDE = tl.constexpr(1)
STEP_GROUP = tl.constexpr(2)
DENSE = tl.constexpr(3)  # gradient (R_j, D_j) to write, of the weight's type
TOUCHED = tl.constexpr(4)  # (R_j,) uint8, or 0
STATE = tl.constexpr(5)  # three, fp32
WEIGHT_FIELDS = tl.constexpr(8)
# Positions in a weight's numbers, float32: `torchrec_qr.ops.update_rules.NUMBERS`.
LEARNING_RATE = tl.constexpr(0)
EPS = tl.constexpr(1)
BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
CORRECTION1 = tl.constexpr(4)
CORRECTION2 = tl.constexpr(5)
MAX_GRADIENT = tl.constexpr(6)
L2 = tl.constexpr(7)
DECAY = tl.constexpr(8)
NUMBERS = tl.constexpr(9)
# Rules: `torchrec_qr.ops.update_rules`, by `compiled_number`.
NOTHING = tl.constexpr(-1)
GRADIENT = tl.constexpr(0)
SGD = tl.constexpr(1)
ADAGRAD = tl.constexpr(2)
ROWWISE_ADAGRAD = tl.constexpr(3)
ADAM = tl.constexpr(4)
AMSGRAD = tl.constexpr(5)
PARTIAL_ROWWISE_ADAM = tl.constexpr(6)
LAMB = tl.constexpr(7)
PARTIAL_ROWWISE_LAMB = tl.constexpr(8)
DECAYS = tl.constexpr(16)


@triton.jit
def of_lanes(x):
    """A number for each lane as (lanes, 1); one of all lanes as it is."""
    if x.type.is_block():
        return x[:, None]
    else:
        return x


@triton.jit
def state_of(weight, S: tl.constexpr, ALIGN: tl.constexpr):
    return of_lanes(tl.multiple_of(tl.load(weight + (STATE + S)).to(tl.pointer_type(tl.float32)), ALIGN))


@triton.jit
def sum_of_squares(x, mask):
    """Σ_d x_d² of each lane, as (lanes, 1)."""
    return tl.sum(tl.where(mask, x * x, 0.0), axis=1)[:, None]


@triton.jit
def step_described(
    gradient,
    row,
    has_row,
    columns,
    weight,
    numbers,
    number,
    RULE: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    STATE_ALIGN: tl.constexpr,
):
    """Steps, per lane that ``has_row``, row ``row`` by ``gradient``; marks it, and writes its gradient, if wanted.

    ``weight``, ``number``: the descriptor and the number of the weight, one of all lanes or one for each.
    """
    mask = has_row[:, None] & (columns < WIDTH)[None, :]
    touched = tl.load(weight + TOUCHED)
    one = (row * 0 + 1).to(tl.uint8)
    tl.store(touched.to(tl.pointer_type(tl.uint8)) + row, one, mask=has_row & (touched != 0))
    if RULE != NOTHING:
        in_state = tl.multiple_of(row * WIDTH, WIDTH & -WIDTH)[:, None] + columns[None, :]
        if RULE == GRADIENT:
            dense = pointer_to(tl.load(weight + DENSE), TYPE, STATE_ALIGN)
            tl.store(of_lanes(dense) + in_state, gradient.to(dense.dtype.element_ty), mask=mask)
        else:
            n = numbers + number * NUMBERS
            rate = of_lanes(tl.load(n + LEARNING_RATE))
            eps = of_lanes(tl.load(n + EPS))
            limit = of_lanes(tl.load(n + MAX_GRADIENT))
            clipped = tl.minimum(tl.maximum(gradient, -limit), limit)
            gradient = tl.where(limit >= 0, clipped, gradient)
            from_row = tl.multiple_of(
                row * tl.load(weight + ROW_STRIDE), (ALIGN + 3) // 4 if TYPE == 0 else (ALIGN + 1) // 2
            )
            of_weight = of_lanes(pointer_to(tl.load(weight + WEIGHT), TYPE, ALIGN))
            stored = of_weight + (from_row[:, None] + columns[None, :])
            value = tl.load(stored, mask=mask, other=0.0).to(tl.float32)
            kind: tl.constexpr = RULE - DECAYS * (RULE >= DECAYS)
            if RULE >= DECAYS:
                gradient += of_lanes(tl.load(n + L2)) * value
                if kind < LAMB:
                    value *= 1 - rate * of_lanes(tl.load(n + DECAY))
            if kind == SGD:
                value -= rate * gradient
            elif kind == ADAGRAD:
                state = state_of(weight, 0, STATE_ALIGN) + in_state
                squares = tl.load(state, mask=mask, other=0.0) + gradient * gradient
                tl.store(state, squares, mask=mask)
                value -= rate * (gradient / (tl.sqrt_rn(squares) + eps))
            elif kind == ROWWISE_ADAGRAD:
                of_row = state_of(weight, 0, 4) + row[:, None]
                squares = tl.sum(tl.where(mask, gradient * gradient, 0.0), axis=1)[:, None] / WIDTH
                squares += tl.load(of_row, mask=has_row[:, None], other=0.0)
                tl.store(of_row, squares, mask=has_row[:, None])
                value -= rate * (gradient / (tl.sqrt_rn(squares) + eps))
            else:
                beta1 = of_lanes(tl.load(n + BETA1))
                beta2 = of_lanes(tl.load(n + BETA2))
                of_mean = state_of(weight, 0, STATE_ALIGN) + in_state
                mean = beta1 * tl.load(of_mean, mask=mask, other=0.0) + (1 - beta1) * gradient
                if (kind == PARTIAL_ROWWISE_ADAM) | (kind == PARTIAL_ROWWISE_LAMB):
                    of_square = state_of(weight, 1, 4) + row[:, None]
                    has_square = has_row[:, None]
                    squares = sum_of_squares(gradient, mask) / WIDTH
                else:
                    of_square = state_of(weight, 1, STATE_ALIGN) + in_state
                    has_square = mask
                    squares = gradient * gradient
                square = beta2 * tl.load(of_square, mask=has_square, other=0.0) + (1 - beta2) * squares
                tl.store(of_mean, mean, mask=mask)
                tl.store(of_square, square, mask=has_square)
                bound = square
                if kind == AMSGRAD:
                    of_largest = state_of(weight, 2, STATE_ALIGN) + in_state
                    bound = tl.maximum(tl.load(of_largest, mask=mask, other=0.0), square)
                    tl.store(of_largest, bound, mask=mask)
                root = tl.sqrt_rn(bound / of_lanes(tl.load(n + CORRECTION2)))
                direction = (mean / of_lanes(tl.load(n + CORRECTION1))) / (root + eps)
                if kind >= LAMB:
                    if RULE >= DECAYS:
                        direction += of_lanes(tl.load(n + DECAY)) * value
                    norm = tl.sqrt_rn(sum_of_squares(direction, mask))
                    ratio = tl.sqrt_rn(sum_of_squares(value, mask)) / tl.where(norm > 0, norm, 1.0)
                    direction *= tl.where(norm > 0, ratio, 0.0)
                value -= rate * direction
            tl.store(stored, value.to(stored.dtype.element_ty), mask=mask)


@kernel("step_group num_rows gradients_stride")
def step_rows(
    rows,
    weight_of_row,
    gradients,
    weights,
    numbers,
    step_group,
    num_rows,
    gradients_stride,
    RULE: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    STATE_ALIGN: tl.constexpr,
    GRADIENT_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Steps, per lane, row rows[c] ≥ 0 of weight weight_of_row[c] by gradients[c].

    Every row occurs once. Weights of other groups (rule, width, type) are left to their own launches.
    """
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = tl.load(rows + c, mask=c < num_rows, other=-1).to(tl.int64)
    has_row = row >= 0
    number = tl.load(weight_of_row + c, mask=has_row, other=0).to(tl.int64)
    weight = weights + number * WEIGHT_FIELDS
    has_row &= tl.load(weight + STEP_GROUP) == step_group
    columns = tl.arange(0, BLOCK_D)
    at = tl.multiple_of(c.to(tl.int64) * gradients_stride, GRADIENT_ALIGN)
    mask = has_row[:, None] & (columns < WIDTH)[None, :]
    gradient = tl.load(gradients + (at[:, None] + columns[None, :]), mask=mask, other=0.0)
    step_described(gradient, row, has_row, columns, weight, numbers, number, RULE, WIDTH, TYPE, ALIGN, STATE_ALIGN)
