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

from typing import NamedTuple

import torch
from torch import Tensor

Tensors = list[Tensor] | tuple[Tensor, ...]
"""Tensors of one device and dtype, one for each parameter."""


class Scalars(NamedTuple):
    """The numbers of one step of a parameter group."""

    lr: float  # lr_k: the step size, as the averaging weight sees it
    ckp1: float  # c_k: how much of z' enters x
    b1: float  # β: what the present y was formed with
    next_b1: float  # β': what the next y is formed with


def recover_x(ys: Tensors, zs: Tensors, b1: float) -> Tensors:
    """x from y and z, as new tensors."""
    return torch._foreach_lerp(ys, zs, 1 - 1 / b1)


def interpolate_y(xs: Tensors, zs: Tensors, b1: float) -> Tensors:
    """y from x and z, as new tensors."""
    return torch._foreach_lerp(zs, xs, b1)


def move_y(ys: Tensors, zs: Tensors, new_zs: Tensors, scalars: Scalars) -> None:
    """The lean update of y in place.

    Through z' - z as z' was rounded, and not through u, its equal on paper: else the
    rounding of z would part y from z for good.
    """
    _, ckp1, b1, next_b1 = scalars
    turn = (b1 - next_b1) / b1 if b1 != next_b1 else 0.0
    torch._foreach_lerp_(ys, zs, ckp1 + turn * (1 - ckp1))
    steps = torch._foreach_sub(new_zs, zs)
    torch._foreach_add_(ys, steps, alpha=1 - next_b1 * (1 - ckp1))


def move_x(xs: Tensors, new_zs: Tensors, ckp1: float) -> None:
    """The average in place."""
    torch._foreach_lerp_(xs, new_zs, ckp1)


def move_mean(means: Tensors, values: Tensors, b: float) -> None:
    """``mean = b mean + (1 - b) value`` in place.

    Written as ``mean + (1 - b) (value - mean)``: rounded to float32, b and 1 - b do
    not add up to 1, and over the memory of the mean the difference adds up too.
    """
    torch._foreach_lerp_(means, values, 1 - b)


def squared(grads: Tensors) -> Tensors:
    """|g|², real also where g is complex."""
    if grads[0].is_complex():
        return [g.real.square() + g.imag.square() for g in grads]
    return torch._foreach_mul(grads, grads)


def over_root(
    numerators: Tensors, v: Tensors, correction: float, eps: float
) -> Tensors:
    """``numerator / (sqrt(v / correction) + eps)``, as new tensors."""
    denominators = torch._foreach_div(v, correction)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    return torch._foreach_div(numerators, denominators)
