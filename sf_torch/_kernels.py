"""The tensor arithmetic of a step, over lists of tensors.

One form serves both ways of stepping: a list of all parameters that share device and
dtypes (``foreach=True``, few and large kernels) or lists of one (``foreach=False``,
temporaries no larger than a single parameter).

    z' = z + u
    x' = x + c (z' - x)                                   where x is stored
    y' = x' + (1 - β') (z' - x')

and with x eliminated, where it is not,

    y' = y + (c + e (1 - c)) (z - y) + (1 - β' (1 - c)) u,     e = (β - β') / β
    x  = y + ((1 - β) / β) (y - z)

with β what y was formed with and β' what y' is formed with.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import torch
from torch import Tensor

Tensors = list[Tensor]


def recovered_x(ys: Tensors, zs: Tensors, b1: float) -> Tensors:
    """x from y and z, as new tensors of z's dtype."""
    away = torch._foreach_sub(ys, zs)
    torch._foreach_mul_(away, (1 - b1) / b1)
    torch._foreach_add_(away, ys)
    return away


def interpolated_y(xs: Tensors, zs: Tensors, b1: float) -> Tensors:
    """y from x and z, as new tensors of z's dtype."""
    towards_z = torch._foreach_sub(zs, xs)
    torch._foreach_mul_(towards_z, 1 - b1)
    torch._foreach_add_(towards_z, xs)
    return towards_z


def move_y(
    ys: Tensors, zs: Tensors, steps: Tensors, ckp1: float, b1: float, next_b1: float
) -> None:
    """The lean update of y in place, from z before its step and the step itself."""
    change = torch._foreach_sub(zs, ys)
    turn = (b1 - next_b1) / b1 if b1 != next_b1 else 0.0
    torch._foreach_mul_(change, ckp1 + turn * (1 - ckp1))
    torch._foreach_add_(change, steps, alpha=1 - next_b1 * (1 - ckp1))
    torch._foreach_add_(ys, change)


def move_x(xs: Tensors, zs: Tensors, ckp1: float) -> None:
    """The average in place, from z after its step."""
    torch._foreach_add_(xs, torch._foreach_sub(zs, xs), alpha=ckp1)


def move_mean(means: Tensors, values: Tensors, b: float) -> None:
    """``mean = b mean + (1 - b) value`` in place.

    Written as ``mean + (1 - b) (value - mean)``: rounded to float32, b and 1 - b do
    not add up to 1, and over the memory of the mean the difference adds up too.
    """
    torch._foreach_add_(means, torch._foreach_sub(values, means), alpha=1 - b)


def squared(grads: Tensors) -> Tensors:
    """|g|², real also where g is complex."""
    if any(g.is_complex() for g in grads):
        return [(g * g.conj()).real if g.is_complex() else g * g for g in grads]
    return list(torch._foreach_mul(grads, grads))


def over_root(
    numerators: Tensors, v: Tensors, correction: float, eps: float
) -> Tensors:
    """``numerator / (sqrt(v / correction) + eps)``, as new tensors."""
    denominators = torch._foreach_div(v, correction)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(numerators, denominators))


def copy(targets: Tensors, sources: Tensors) -> None:
    """Writes sources into targets, rounding to the targets' dtypes."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
