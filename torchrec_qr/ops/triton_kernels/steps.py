"""One exact step of an optimizer per row, from its summed gradient.

Formulas: `torchrec_qr.distributed.fused_params`. In fp32; weights of fp16 and bf16 are rounded to the nearest, once.
Only rows with a gradient move, and their state.
"""

import triton
import triton.language as tl

from .id_rows import pointer_to

# Positions in a weight's descriptor, int64.
WEIGHT = tl.constexpr(0)
ROW_STRIDE = tl.constexpr(1)
GROUP = tl.constexpr(2)
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
NUMBERS = tl.constexpr(7)
# Rules: `torchrec_qr.ops.arguments.RULES`.
NOTHING = tl.constexpr(-1)
GRADIENT = tl.constexpr(0)
SGD = tl.constexpr(1)
ADAGRAD = tl.constexpr(2)
ROWWISE_ADAGRAD = tl.constexpr(3)
ADAM = tl.constexpr(4)
AMSGRAD = tl.constexpr(5)


@triton.jit
def state_of(weight, S: tl.constexpr, has_row, ALIGN: tl.constexpr):
    address = tl.load(weight + (STATE + S), mask=has_row, other=0)
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)


@triton.jit(do_not_specialize=["group", "num_rows"])
def step_rows(
    rows,
    weight_of_row,
    gradients,
    weights,
    numbers,
    group,
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
    number = tl.load(weight_of_row + c, mask=has_row, other=0)
    weight = weights + number.to(tl.int64) * WEIGHT_FIELDS
    has_row &= tl.load(weight + GROUP) == group
    columns = tl.arange(0, BLOCK_D)
    mask = has_row[:, None] & (columns < WIDTH)[None, :]
    touched = tl.load(weight + TOUCHED)
    one = (c * 0 + 1).to(tl.uint8)
    tl.store(touched.to(tl.pointer_type(tl.uint8)) + row, one, mask=has_row & (touched != 0))
    if RULE != NOTHING:
        at = tl.multiple_of(c.to(tl.int64) * gradients_stride, GRADIENT_ALIGN)
        gradient = tl.load(gradients + (at[:, None] + columns[None, :]), mask=mask, other=0.0)
        in_state = tl.multiple_of(row * WIDTH, WIDTH & -WIDTH)[:, None] + columns[None, :]
        if RULE == GRADIENT:
            dense = pointer_to(tl.load(weight + DENSE), TYPE, STATE_ALIGN)
            tl.store(dense[:, None] + in_state, gradient.to(dense.dtype.element_ty), mask=mask)
        else:
            n = numbers + number * NUMBERS
            rate = tl.load(n + LEARNING_RATE)[:, None]
            eps = tl.load(n + EPS)[:, None]
            limit = tl.load(n + MAX_GRADIENT)[:, None]
            clipped = tl.minimum(tl.maximum(gradient, -limit), limit)
            gradient = tl.where(limit >= 0, clipped, gradient)
            from_row = tl.multiple_of(
                row * tl.load(weight + ROW_STRIDE), (ALIGN + 3) // 4 if TYPE == 0 else (ALIGN + 1) // 2
            )
            stored = pointer_to(tl.load(weight + WEIGHT), TYPE, ALIGN)[:, None] + (from_row[:, None] + columns[None, :])
            value = tl.load(stored, mask=mask, other=0.0).to(tl.float32)
            if RULE == SGD:
                value -= rate * gradient
            elif RULE == ADAGRAD:
                state = state_of(weight, 0, has_row, STATE_ALIGN)[:, None] + in_state
                squares = tl.load(state, mask=mask, other=0.0) + gradient * gradient
                tl.store(state, squares, mask=mask)
                value -= rate * (gradient / (tl.sqrt_rn(squares) + eps))
            elif RULE == ROWWISE_ADAGRAD:
                of_row = state_of(weight, 0, has_row, 4) + row
                squares = tl.load(of_row, mask=has_row, other=0.0) + tl.sum(gradient * gradient, axis=1) / WIDTH
                tl.store(of_row, squares, mask=has_row)
                value -= rate * (gradient / (tl.sqrt_rn(squares)[:, None] + eps))
            else:
                beta1 = tl.load(n + BETA1)[:, None]
                beta2 = tl.load(n + BETA2)[:, None]
                of_mean = state_of(weight, 0, has_row, STATE_ALIGN)[:, None] + in_state
                of_square = state_of(weight, 1, has_row, STATE_ALIGN)[:, None] + in_state
                mean = beta1 * tl.load(of_mean, mask=mask, other=0.0) + (1 - beta1) * gradient
                square = beta2 * tl.load(of_square, mask=mask, other=0.0) + (1 - beta2) * (gradient * gradient)
                tl.store(of_mean, mean, mask=mask)
                tl.store(of_square, square, mask=mask)
                bound = square
                if RULE == AMSGRAD:
                    of_largest = state_of(weight, 2, has_row, STATE_ALIGN)[:, None] + in_state
                    bound = tl.maximum(tl.load(of_largest, mask=mask, other=0.0), square)
                    tl.store(of_largest, bound, mask=mask)
                root = tl.sqrt_rn(bound / tl.load(n + CORRECTION2)[:, None])
                value -= rate * ((mean / tl.load(n + CORRECTION1)[:, None]) / (root + eps))
            tl.store(stored, value.to(stored.dtype.element_ty), mask=mask)
