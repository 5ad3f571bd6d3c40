"""The whole step of one parameter, as the formulas of :mod:`sf_torch._step.numbers`.

Written for reading: plain operators on one parameter's arrays. ``torch.compile`` makes
one kernel of it. Arrays that the faster executors do not take (other layouts, complex
numbers, narrow state) are moved by it, and each faster executor is tested against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sf_torch._step.batches import Leaf, arithmetic_dtype, is_master, wide_dtype
from sf_torch._step.numbers import Number, Numbers
from sf_torch._step.rounding import Rounding, lean_y
from sf_torch._step.schedule import where


@dataclass
class Plain:
    """Executor: one parameter."""

    member: int  # which parameter
    leaf: Leaf
    seed: int | None = None  # of random rounding; None: to nearest
    place: int = 0  # of the parameter in the optimizer, for the seed

    def step(self, n: Numbers, grads: Sequence[Tensor]) -> None:
        rounding = None
        if self.seed is not None:
            rounding = Rounding(self.seed, self.place, n.step)
        step(self.leaf, grads[self.member], n, rounding)

    def sums(
        self, grads: Sequence[Tensor], beta: float, b1: float
    ) -> list[tuple[int, Tensor]]:
        """The sums of the parameter, with its number."""
        return [(self.member, sums(self.leaf, grads[self.member], beta, b1))]

    def to_compile(self, grads: Sequence[Tensor]) -> list[tuple[Leaf, Tensor]]:
        """What compiled code moves by :func:`step`."""
        return [(self.leaf, grads[self.member])]

    def finish(self) -> None:
        """Nothing is left to do after a compiled step."""


def step(
    leaf: Leaf, grad: Tensor, n: Numbers, rounding: Rounding | None = None
) -> None:
    """Moves the arrays of one parameter in place.

    Args:
      leaf: the arrays.
      grad: the gradient at y.
      n: the numbers of the step.
      rounding: of what goes into bfloat16 arrays; None: to nearest.
    """
    dtype = arithmetic_dtype(leaf)
    # Not dtype.to_real(), which torch.compile cannot look into.
    is_double = dtype in (torch.float64, torch.complex128)
    n = n.in_dtype(torch.float64 if is_double else torch.float32)
    param = leaf["param"]
    z, g = leaf["z"].to(dtype), grad.to(dtype)
    x = leaf["x"].to(dtype) if "x" in leaf else None
    if x is not None and is_master(leaf["z"], param):
        y = lerp(x, z, n.z_in_y)  # the parameter is a rounding of it
    else:
        y = param.to(dtype)

    if n.decay_moves_x:
        y, z, x = _shrunk(y, z, x, n)
    if "next_z" in leaf:
        next_z = leaf["next_z"]
    else:
        next_z = z - _displacement(leaf, g, y, z, x, n, rounding)
    rounded_z = _rounded(leaf, "z", next_z, rounding)
    next_z = rounded_z.to(dtype)

    if x is None and rounding is not None and param.dtype == torch.bfloat16:
        next_y = lean_y(y, z, next_z, n)
    elif x is None:
        # Through z' - z as z' was rounded: through the displacement, its equal on
        # paper, the rounding of z would part y from z for good. And as one sum: each
        # rounding of y is one of x, times 1 / β.
        next_y = y + (n.to_step * (next_z - z) + n.to_z * (z - y))
    else:
        leaf["x"].copy_(_rounded(leaf, "x", lerp(x, next_z, n.ckp1), rounding))
        next_x = leaf["x"].to(dtype)
        next_y = lerp(next_x, next_z, n.z_in_next_y)
    leaf["z"].copy_(rounded_z)
    param.copy_(_rounded(leaf, "param", next_y, rounding))
    if "y" in leaf:
        leaf["y"].copy_(_rounded(leaf, "y", next_y, rounding))


def sums(leaf: Leaf, grad: Tensor, beta: float, b1: float) -> Tensor:
    """``Σ β g·(z - x)`` and ``Σ|g|`` of one parameter, in one tensor.

    Args:
      leaf: the arrays.
      grad: the gradient at y.
      beta: β of the step.
      b1: β of the present y.
    """
    dtype = arithmetic_dtype(leaf)
    g, z = grad.to(dtype), leaf["z"].to(dtype)
    # Where x is not stored: z - y = b1 (z - x).
    way = z - (leaf["x"] if "x" in leaf else leaf["param"])
    inner = (beta if "x" in leaf else beta / b1) * (g.conj() * way).real.sum()
    return torch.stack([inner, g.abs().sum()])


def _rounded(leaf: Leaf, row: str, value: Tensor, rounding: Rounding | None) -> Tensor:
    """A value in the dtype of one of the arrays."""
    dtype = leaf[row].dtype
    if rounding is None or dtype != torch.bfloat16:
        return value.to(dtype)
    return rounding.to_bfloat16(row, value)


def _displacement(
    leaf: Leaf,
    g: Tensor,
    y: Tensor,
    z: Tensor,
    x: Tensor | None,
    n: Numbers,
    rounding: Rounding | None,
) -> Tensor:
    """``lr d + decay p``. Moves the moments in place."""
    direction = g
    if "exp_avg" in leaf:
        m = leaf["exp_avg"].to(g.dtype)
        direction = lerp(m, g, n.m_weight)
        leaf["exp_avg"].copy_(_rounded(leaf, "exp_avg", direction, rounding))
        direction = leaf["exp_avg"].to(g.dtype)
    if "exp_avg_sq" in leaf:
        square = (g * g.conj()).real if g.is_complex() else g * g
        kept, dtype = leaf["exp_avg_sq"], square.dtype
        in_place = n.v_in_place and rounding is None and kept.dtype != dtype
        v = kept.to(dtype)
        if in_place:
            v = _to_and_fro(n.b2 * v, kept.dtype) + n.v_weight * square
        else:
            v = lerp(v, square, n.v_weight)
        kept.copy_(_rounded(leaf, "exp_avg_sq", v, rounding))
        root = n.root * kept.to(dtype).sqrt()
        if in_place:
            # A float16 has no eps of 1e-8: while v is 0, it would be 0 / 0.
            least = torch.finfo(kept.dtype).tiny ** 0.5
            root = _to_and_fro(root, kept.dtype) + where(n.eps > least, n.eps, least)
            direction = direction / _to_and_fro(root, kept.dtype)
        else:
            direction = direction / (root + n.eps)
    displacement = n.lr * direction
    if n.decay_at and not n.decay_moves_x:
        if x is None:
            x = lerp(y, z, n.z_in_x)
        displacement = displacement + n.decay * {"y": y, "z": z, "x": x}[n.decay_at]
    return displacement


def _to_and_fro(value: Tensor, narrow: torch.dtype) -> Tensor:
    """A value as a narrower dtype has it, in its own dtype."""
    return value.to(narrow).to(value.dtype)


def _shrunk(
    y: Tensor, z: Tensor, x: Tensor | None, n: Numbers
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shrinks z or y by the decay, keeps the other, and sets x to what both imply."""
    if n.decay_at == "z":
        if x is not None:
            x = x - n.decay * n.z_in_x * z
        return y, z - n.decay * z, x
    if x is not None:
        x = x - n.decay * (1 - n.z_in_x) * y
    return y - n.decay * y, z, x


def lerp(a: Tensor, b: Tensor, weight: Number) -> Tensor:
    """``a + weight (b - a)``, exactly b where the weight is 1."""
    if not isinstance(weight, Tensor):
        return torch.lerp(a, b, weight)
    way = b - a
    return torch.where(weight < 0.5, a + weight * way, b - (1 - weight) * way)


def wide_lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``a + weight (b - a)`` as a new tensor, in the dtype of arithmetic."""
    dtype = wide_dtype(a.dtype, b.dtype)
    return torch.lerp(a.to(dtype), b.to(dtype), weight)


def recover_x(y: Tensor, z: Tensor, b1: float) -> Tensor:
    """x from y and z, in the dtype of arithmetic."""
    return wide_lerp(y, z, 1 - 1 / b1)


def recover_y(x: Tensor, z: Tensor, b1: float) -> Tensor:
    """y from x and z, in the dtype of arithmetic."""
    return wide_lerp(x, z, 1 - b1)
