"""The step as a Triton kernel; imported only where Triton is.

One program moves one block of one tensor: reads each array once, writes it once. The
formulas are those of :mod:`sf_torch._step.numbers`, whose numbers a kernel reads from
memory, by name.
"""

import torch
import triton
import triton.language as tl

from sf_torch._step.numbers import NAMES

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# Where in memory a kernel finds each number.
(
    LR,
    DECAY,
    M_WEIGHT,
    V_WEIGHT,
    ROOT,
    EPS,
    CKP1,
    Z_IN_X,
    Z_IN_Y,
    Z_IN_NEXT_Y,
    TO_Z,
    TO_STEP,
    SKIP,
) = (tl.constexpr(place) for place, _ in enumerate(NAMES))


@triton.jit
def _number(numbers, PLACE: tl.constexpr):
    return tl.load(numbers + PLACE).to(tl.float32)


@triton.jit
def _block(blocks, sizes, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    which = tl.load(blocks + 2 * program)
    start = tl.multiple_of(tl.load(blocks + 2 * program + 1), BLOCK)
    size = tl.load(sizes + which)
    if ALIGNED:  # 16 bytes are then all inside or all outside, and move at once
        size = tl.multiple_of(size, 16)
    offsets = start + tl.arange(0, BLOCK)
    return which, offsets, offsets < size


@triton.jit
def _pointer(table, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + at).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _lerp(a, b, weight):
    # Exactly b where the weight is 1, as in the first step's average.
    near_a = a + weight * (b - a)
    near_b = b - (b - a) * (1 - weight)
    return tl.where(weight < 0.5, near_a, near_b)


@triton.jit(do_not_specialize=["n"])
def step_kernel(
    table,  # (rows, n) int64: addresses, and sizes in the last row
    grads,  # (n,) int64: addresses
    blocks,  # (programs, 2) int64: which tensor, and where the block starts in it
    numbers,  # (len(NAMES),) float64
    n,
    PARAM_ROW: tl.constexpr,
    Z_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    Y_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    M_ROW: tl.constexpr,
    SIZE_ROW: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MASTER: tl.constexpr,
    DECAY_AT: tl.constexpr,
    DECAY_MOVES_X: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(numbers + SKIP) != 0:
        return
    which, offsets, mask = _block(blocks, table + SIZE_ROW * n, ALIGNED, BLOCK)
    param_at = _pointer(table, PARAM_ROW * n + which, PARAM, ALIGNED) + offsets
    grad_at = _pointer(grads, which, GRAD, ALIGNED) + offsets
    z_at = _pointer(table, Z_ROW * n + which, tl.float32, ALIGNED) + offsets
    g = tl.load(grad_at, mask=mask).to(tl.float32)
    z = tl.load(z_at, mask=mask)
    if X_ROW >= 0:
        x_at = _pointer(table, X_ROW * n + which, tl.float32, ALIGNED) + offsets
        x = tl.load(x_at, mask=mask)
    if MASTER:
        y = _lerp(x, z, _number(numbers, Z_IN_Y))
    else:
        y = tl.load(param_at, mask=mask).to(tl.float32)

    if DECAY_MOVES_X:
        decay = _number(numbers, DECAY)
        if DECAY_AT == "z":
            if X_ROW >= 0:
                x -= decay * _number(numbers, Z_IN_X) * z
            z -= decay * z
        else:
            if X_ROW >= 0:
                x -= decay * (1 - _number(numbers, Z_IN_X)) * y
            y -= decay * y

    direction = g
    if M_ROW >= 0:
        m_at = _pointer(table, M_ROW * n + which, tl.float32, ALIGNED) + offsets
        m = tl.load(m_at, mask=mask)
        m += _number(numbers, M_WEIGHT) * (g - m)
        tl.store(m_at, m, mask=mask)
        direction = m
    if V_ROW >= 0:
        v_at = _pointer(table, V_ROW * n + which, tl.float32, ALIGNED) + offsets
        v = tl.load(v_at, mask=mask, other=1.0)
        v += _number(numbers, V_WEIGHT) * (g * g - v)
        tl.store(v_at, v, mask=mask)
        root = _number(numbers, ROOT) * tl.sqrt_rn(v) + _number(numbers, EPS)
        direction = tl.div_rn(direction, root)
    displacement = _number(numbers, LR) * direction
    if DECAY_AT != "" and not DECAY_MOVES_X:
        decay = _number(numbers, DECAY)
        if DECAY_AT == "y":
            displacement += decay * y
        elif DECAY_AT == "z":
            displacement += decay * z
        else:
            if X_ROW < 0:
                x = y + _number(numbers, Z_IN_X) * (z - y)
            displacement += decay * x
    new_z = z - displacement
    tl.store(z_at, new_z, mask=mask)

    if X_ROW >= 0:
        x = _lerp(x, new_z, _number(numbers, CKP1))
        tl.store(x_at, x, mask=mask)
        y = _lerp(x, new_z, _number(numbers, Z_IN_NEXT_Y))
    else:
        # Through z' - z as z' was rounded, and as one sum: see formula.step.
        moved = _number(numbers, TO_STEP) * (new_z - z)
        y += moved + _number(numbers, TO_Z) * (z - y)
    tl.store(param_at, y.to(PARAM), mask=mask)
    if Y_ROW >= 0:
        y_at = _pointer(table, Y_ROW * n + which, tl.float32, ALIGNED) + offsets
        tl.store(y_at, y, mask=mask)
