"""The tensor arithmetic of a step, over lists of tensors of one dtype.

    z' = z + u
    x' = x + c (z' - x)                                   where x is stored
    y' = z' + β' (x' - z')

and with x eliminated, where it is not,

    y' = y + (c + e (1 - c)) (z - y) + (1 - β' (1 - c)) (z' - z),    e = (β - β') / β
    x  = y + ((1 - β) / β) (y - z)

with β what y was formed with and β' what y' is formed with.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from functools import cache, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sf_torch._leaves import Leaves

Tensors = list[Tensor] | tuple[Tensor, ...]
"""Tensors of one device and dtype, one for each parameter."""


Number = float | Tensor
"""A float, or where it changes in a compiled step a () tensor: else each value would
be a new program."""


class Scalars(NamedTuple):
    """The numbers of one step of a parameter group."""

    lr: Any  # lr_k: the step size, as the averaging weight sees it; a Number
    ckp1: Any  # c_k: how much of z' enters x; a Number
    b1: float  # β: what the present y was formed with
    next_b1: float  # β': what the next y is formed with


class BaseStep(NamedTuple):
    """One step of the base optimizer in numbers.

    m  = b m + (1 - b) g,  ĝ = m / momentum_correction       or ĝ = g if b = 0
    v  = b2 v + (1 - b2) |g|²
    z' = z - lr (ĝ / (sqrt(v / correction) + eps) + λ p)     or without the division
    """

    lr: Any  # a Number, as the two corrections are
    weight_decay: float  # λ
    decay_at: str  # which of x, y, z before the step is p
    b2: float | None = None  # None: no v
    correction: Any = 1.0
    eps: float = 0.0
    divides: bool = True
    inner_momentum: float = 0.0  # b; 0: no m
    momentum_correction: Any = 1.0
    steps: int | None = None  # k + 1 where both corrections are 1 - b^(k + 1)

    def positive_eps(self, dtype: torch.dtype = torch.float32) -> float:
        """eps, but at least the root of the smallest normal v of this dtype.

        While all gradients are 0, so is v, and 0 / 0 is NaN. And a gradient may be so
        small that its square is 0: over anything less, it would throw z far off.
        """
        return max(self.eps, torch.finfo(dtype).tiny ** 0.5)


def as_tensors(base: BaseStep, scalars: Scalars) -> tuple[BaseStep, Scalars]:
    """The same with those that change from step to step as () tensors."""
    changing = (base.lr, base.correction, base.momentum_correction, scalars.ckp1)
    numbers = torch.tensor(changing, dtype=torch.float64).unbind()
    lr, correction, momentum_correction, ckp1 = numbers
    base = base._replace(
        lr=lr,
        correction=correction,
        momentum_correction=momentum_correction,
        steps=None,
    )
    return base, scalars._replace(lr=lr, ckp1=ckp1)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on these: their widest, at least float32."""
    # PyTorch does not promote float8, whose values float32 has all.
    wide = (dtype for dtype in dtypes if dtype.itemsize > 1)
    return reduce(torch.promote_types, wide, torch.float32)


def wide(a: Tensor, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Both in the dtype of arithmetic, as lists of one."""
    dtype = wide_dtype(a.dtype, z.dtype)
    return [a.to(dtype)], [z.to(dtype)]


def recover_x(ys: Tensors, zs: Tensors, b1: float) -> Tensors:
    """x from y and z, as new tensors."""
    return torch._foreach_lerp(ys, zs, 1 - 1 / b1)


def interpolate_y(xs: Tensors, zs: Tensors, b1: float) -> Tensors:
    """y from x and z, as new tensors."""
    return torch._foreach_lerp(xs, zs, 1 - b1)


def move_y(leaves: "Leaves", ys: Tensors, before: Tensors, scalars: Scalars) -> None:
    """The lean update of y in place, after z has moved; before is overwritten.

    With d = z - y from before the step and d' = z' - y,

        y' = y + to_step d' + (to_z - to_step) d

    Through z' - z as z' was rounded, and not through u, its equal on paper: else the
    rounding of z would part y from z for good. And added to y as one sum: each
    rounding of y is one of x, times 1 / β, and they add up.
    """
    zs = leaves.zs
    to_z, to_step = lean_coefficients(scalars)
    if leaves.one_pass and to_step != 0:
        # PyTorch's SGD in one pass: a gradient z', whose decay by -1 makes it d', with
        # d as its momentum.
        momentum = (to_z - to_step) / to_step
        torch._fused_sgd_(
            ys,
            zs,
            before if momentum else [],
            weight_decay=-1.0,
            momentum=momentum,
            lr=-to_step,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        return
    after = leaves.spare("z' - y")
    set_difference(after, zs, ys)
    if isinstance(to_step, Tensor) or to_step == 0:
        torch._foreach_mul_(before, to_z - to_step)
        _add_scaled_(before, after, to_step)
        torch._foreach_add_(ys, before)
    else:  # the same with one pass less
        torch._foreach_add_(after, before, alpha=(to_z - to_step) / to_step)
        torch._foreach_add_(ys, after, alpha=to_step)


def lean_coefficients(scalars: Scalars) -> tuple[float, float]:
    """Of (z - y) and of (z' - z)."""
    _, ckp1, b1, next_b1 = scalars
    turn = (b1 - next_b1) / b1 if b1 != next_b1 else 0.0
    return ckp1 + turn * (1 - ckp1), 1 - next_b1 * (1 - ckp1)


def move_x(xs: Tensors, zs: Tensors, ckp1: Number) -> None:
    """The average in place."""
    _lerp_(xs, zs, ckp1)


def move_z(leaves: "Leaves", step: BaseStep) -> None:
    """z and the moments in place."""
    if step.steps is not None and step.b2 is not None and leaves.one_pass:
        _fused_adam(leaves, step)
        return
    directions = leaves.grads
    if step.inner_momentum:
        means = leaves.moments["exp_avg"]
        move_mean(means, leaves.grads, step.inner_momentum)
        directions = _divided(means, step.momentum_correction)
    if step.b2 is not None:
        v = leaves.moments["exp_avg_sq"]
        move_mean(v, _squared(leaves.grads), step.b2)
        if step.divides:
            roots = _divided(v, step.correction)
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, step.positive_eps(roots[0].dtype))
            directions = torch._foreach_div(directions, roots)
    if step.weight_decay:
        at = leaves.at(step.decay_at)
        directions = torch._foreach_add(directions, at, alpha=step.weight_decay)
    _add_scaled_(leaves.zs, directions, -step.lr)


CORRECTED_EVERY = 32
"""Steps after which v is scaled by what the kernel's b2 is off, :func:`_error_of`."""


def _fused_adam(leaves: "Leaves", step: BaseStep) -> None:
    v, b, b2 = list(leaves.moments["exp_avg_sq"]), step.inner_momentum, step.b2
    steps = step.steps
    assert b2 is not None
    assert steps is not None
    # Without momentum the kernel still writes one, and reads it: 0 times whatever lies
    # in fresh memory may be NaN.
    means = leaves.moments["exp_avg"] if b else leaves.spare("mean")
    if not b:
        torch._foreach_zero_(means)
    targets = leaves.zs
    if step.weight_decay:
        # Apart from z, so that z is rounded once, with the decay in it.
        targets = leaves.spare("step")
        scale = -step.lr * step.weight_decay
        for target, p in zip(targets, leaves.at(step.decay_at), strict=True):
            torch.mul(p, scale, out=target)
    torch._fused_adam_(
        targets,
        leaves.grads,
        means,
        v,
        [],
        [torch.tensor(float(steps))] * len(v),
        lr=step.lr,
        beta1=b,
        beta2=b2,
        weight_decay=0.0,
        eps=step.positive_eps(),
        amsgrad=False,
        maximize=False,
    )
    if step.weight_decay:
        torch._foreach_add_(leaves.zs, targets)
    if steps % CORRECTED_EVERY == 0 and _error_of(b2) != 1:
        torch._foreach_mul_(v, _error_of(b2) ** CORRECTED_EVERY)


@cache
def _error_of(b2: float) -> float:
    """b2 over the float32 next to it, which the kernel multiplies v by.

    For b2 = 0.999 they differ by 1.3e-8, and so over the memory of v by 1.3e-5. Too
    little for v to show in one step, it is enough to be made good every few.
    """
    return b2 / torch.tensor(b2, dtype=torch.float32).item() if b2 else 1.0


def move_mean(means: Tensors, values: Tensors, b: float) -> None:
    """``mean = b mean + (1 - b) value`` in place.

    Written as ``mean + (1 - b) (value - mean)``: rounded to float32, b and 1 - b do
    not add up to 1, and over the memory of the mean the difference adds up too.
    """
    torch._foreach_lerp_(means, values, 1 - b)


def _squared(grads: Tensors) -> Tensors:
    """|g|², real also where g is complex."""
    if grads[0].is_complex():
        return [g.real.square() + g.imag.square() for g in grads]
    return torch._foreach_mul(grads, grads)


def set_difference(targets: Tensors, a: Tensors, b: Tensors) -> None:
    """``target = a - b``"""
    if targets[0].device.type == "cpu" and not torch.compiler.is_compiling():
        for target, one, other in zip(targets, a, b, strict=True):
            torch.sub(one, other, out=target)
    else:
        torch._foreach_copy_(targets, a)
        torch._foreach_sub_(targets, b)


def set_between(targets: Tensors, xs: Tensors, zs: Tensors, b1: float) -> None:
    """``target = y`` of x and z"""
    if targets[0].device.type == "cpu" and not torch.compiler.is_compiling():
        for target, x, z in zip(targets, xs, zs, strict=True):
            torch.lerp(x, z, 1 - b1, out=target)
    else:
        torch._foreach_copy_(targets, xs)
        torch._foreach_lerp_(targets, zs, 1 - b1)


def _add_scaled_(tensors: Tensors, others: Tensors, scale: Number) -> None:
    if isinstance(scale, Tensor):
        torch._foreach_add_(tensors, _scaled(others, scale))
    else:
        torch._foreach_add_(tensors, others, alpha=scale)


def _lerp_(tensors: Tensors, others: Tensors, weight: Number) -> None:
    if isinstance(weight, Tensor):
        for tensor, other in zip(tensors, others, strict=True):
            # Exactly other where the weight is 1, as lerp has it.
            way = other - tensor
            from_other = other - way * (1 - weight)
            tensor.copy_(torch.where(weight < 0.5, tensor + way * weight, from_other))
    else:
        torch._foreach_lerp_(tensors, others, weight)


def _divided(tensors: Tensors, divisor: Number) -> Tensors:
    if isinstance(divisor, Tensor):
        return [(t / divisor).to(t.dtype) for t in tensors]
    return torch._foreach_div(tensors, divisor)


def _scaled(tensors: Tensors, scale: Tensor) -> list[Tensor]:
    # Without the cast a float64 number would widen tensors that are () too.
    return [(t * scale).to(t.dtype) for t in tensors]
