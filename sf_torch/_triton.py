"""The Triton kernels of :mod:`sf_torch._fused`; imported only where Triton is there.

One program moves one block of one tensor: reads each array once, writes it once.
"""

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


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
    numbers,  # (14,) float64: see _fused.numbers_of
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
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        y = _lerp(x, z, tl.load(numbers + 11).to(tl.float32))
    else:
        y = tl.load(param_at, mask=mask).to(tl.float32)
        if DECAY_AT == "x" and X_ROW < 0:
            x = y + tl.load(numbers + 13).to(tl.float32) * (z - y)

    direction = g
    if M_ROW >= 0:
        m_at = _pointer(table, M_ROW * n + which, tl.float32, ALIGNED) + offsets
        m = tl.load(m_at, mask=mask)
        m += tl.load(numbers + 6).to(tl.float32) * (g - m)
        tl.store(m_at, m, mask=mask)
        correction = tl.load(numbers + 7).to(tl.float32)
        direction = tl.div_rn(m, tl.broadcast_to(correction, m.shape))
    if V_ROW >= 0:
        v_at = _pointer(table, V_ROW * n + which, tl.float32, ALIGNED) + offsets
        v = tl.load(v_at, mask=mask, other=1.0)
        v += tl.load(numbers + 2).to(tl.float32) * (g * g - v)
        tl.store(v_at, v, mask=mask)
        correction = tl.load(numbers + 3).to(tl.float32)
        root = tl.sqrt_rn(tl.div_rn(v, tl.broadcast_to(correction, v.shape)))
        root += tl.load(numbers + 4).to(tl.float32)
        root = tl.where(tl.load(numbers + 5) != 0, root, 1.0)
        direction = tl.div_rn(direction, root)
    decay = tl.load(numbers + 1).to(tl.float32)
    if DECAY_AT == "y":
        direction += decay * y
    elif DECAY_AT == "z":
        direction += decay * z
    elif DECAY_AT == "x":
        direction += decay * x
    new_z = z - tl.load(numbers).to(tl.float32) * direction
    tl.store(z_at, new_z, mask=mask)

    if X_ROW >= 0:
        x = _lerp(x, new_z, tl.load(numbers + 10).to(tl.float32))
        tl.store(x_at, x, mask=mask)
        y = _lerp(x, new_z, tl.load(numbers + 12).to(tl.float32))
    else:
        # Through z' - z as it was rounded, and as one sum, see move_y.
        to_z = tl.load(numbers + 8).to(tl.float32)
        to_step = tl.load(numbers + 9).to(tl.float32)
        y += to_step * (new_z - z) + to_z * (z - y)
    tl.store(param_at, y.to(PARAM), mask=mask)
    if Y_ROW >= 0:
        y_at = _pointer(table, Y_ROW * n + which, tl.float32, ALIGNED) + offsets
        tl.store(y_at, y, mask=mask)


@triton.jit(do_not_specialize=["n", "from_y", "from_x"])
def switch_kernel(
    table,  # (4, n) int64: addresses of param, z and the y that is kept; sizes
    blocks,  # as above
    n,
    from_y,  # 1 - 1 / β: x lies there on the line from y to z
    from_x,  # 1 - β: and y there on that from x to z
    TO_X: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which, offsets, mask = _block(blocks, table + 3 * n, ALIGNED, BLOCK)
    param_at = _pointer(table, which, tl.float32, ALIGNED) + offsets
    z_at = _pointer(table, n + which, tl.float32, ALIGNED) + offsets
    y_at = _pointer(table, 2 * n + which, tl.float32, ALIGNED) + offsets
    param = tl.load(param_at, mask=mask)
    z = tl.load(z_at, mask=mask)
    if TO_X:
        tl.store(y_at, param, mask=mask)
        tl.store(param_at, _lerp(param, z, from_y), mask=mask)
    else:
        y = tl.load(y_at, mask=mask)
        # Where it is no longer the x of that y, a y of its own.
        is_left = _lerp(y, z, from_y) == param
        y = tl.where(is_left, y, _lerp(param, z, from_x))
        tl.store(param_at, y, mask=mask)
