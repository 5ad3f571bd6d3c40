r"""The update of the three sequences, for one leaf or for lists of leaves.

With β the interpolation that formed y, β' the next one, c the averaging weight:

.. math::

    x' &= (1 - c) x + c z' \\
    y' &= (1 - \beta') z' + \beta' x'

Where x is not stored it is ``x = y + (1 - β) / β (y - z)``, and

.. math::

    y' = y + (c + e (1 - c)) (z - y) + (1 - \beta' (1 - c)) (z' - z),
    \qquad e = (\beta - \beta') / \beta

Each formula is written once. ``SINGLE`` runs it on one tensor, ``FOREACH`` on lists
of tensors, through PyTorch's operations of the same name.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Operand = Any
"""A tensor with ``SINGLE``, a list of tensors with ``FOREACH``."""


class Ops:
    """The tensor operations that an update needs; ``_`` marks those in place."""

    def __init__(self, named: Callable[[str], Callable[..., Any]]) -> None:
        self.add, self.add_ = named("add"), named("add_")
        self.sub_ = named("sub_")
        self.mul, self.mul_ = named("mul"), named("mul_")
        self.div, self.sqrt_ = named("div"), named("sqrt_")
        self.lerp, self.lerp_ = named("lerp"), named("lerp_")
        self.addcmul_ = named("addcmul_")
        self.copy_ = named("copy_")


SINGLE = Ops(lambda name: getattr(torch.Tensor, name))
FOREACH = Ops(lambda name: getattr(torch, f"_foreach_{name}"))


class Leaves(NamedTuple):
    """What a step sees of a parameter, or of many in the foreach form."""

    param: Operand  # what the model holds: y, rounded to the parameter's dtype
    grad: Operand  # in the state's dtype; may be p.grad itself, so never written to
    y: Operand  # in the state's dtype; the same tensor as param where that is exact
    z: Operand  # in the state's dtype: the base optimizer's iterate
    x: Operand | None  # in the state's dtype; None where it is recovered from y
    state: dict[str, Operand]  # everything that is stored, moments included


def stacked(leaves: Sequence[Leaves]) -> Leaves:
    """Leaves of one kind as one ``Leaves`` of lists, for ``FOREACH``."""
    first, columns = leaves[0], list(zip(*leaves, strict=True))
    param, grad, y, z, x = map(list, columns[:5])
    state = {key: [leaf.state[key] for leaf in leaves] for key in first.state}
    return Leaves(param, grad, y, z, None if first.x is None else x, state)


def advance(
    ops: Ops, leaves: Leaves, z_new: Operand, ckp1: float, beta: float, beta_new: float
) -> None:
    """Moves z to z_new, and x and y with it; β formed y, β' is to form the next y."""
    y, z, x = leaves.y, leaves.z, leaves.x
    if x is None:
        pull = 0.0 if beta == beta_new else (beta - beta_new) / beta
        ops.lerp_(y, z, ckp1 + pull * (1 - ckp1))
        # Through z' - z as it was rounded, not through the step that led to it: y
        # and z then never part by more than y's own rounding.
        ops.sub_(z, z_new)
        ops.add_(y, z, alpha=beta_new * (1 - ckp1) - 1)
        ops.copy_(z, z_new)
        return
    ops.copy_(z, z_new)
    ops.lerp_(x, z, ckp1)
    y_new = ops.lerp(z, x, beta_new)
    ops.copy_(leaves.param, y_new)
    if "y" in leaves.state:
        ops.copy_(leaves.state["y"], y_new)


def recover_x(ops: Ops, y: Operand, z: Operand, beta: float) -> Operand:
    """``x = y + (1 - β) / β (y - z)``."""
    if beta == 0:
        raise ValueError(
            "x cannot be recovered from y with an interpolation of 0. Build the "
            "optimizer with store_x=True before the interpolation is set to 0."
        )
    return ops.lerp(y, z, 1 - 1 / beta)


def interpolate(ops: Ops, x: Operand, z: Operand, beta: float) -> Operand:
    """``y = (1 - β) z + β x``, rounded as :func:`advance` rounds it with x stored."""
    return ops.lerp(z, x, beta)


def add_square_(ops: Ops, v: Operand, g: Operand, value: float) -> None:
    """``v += value |g|^2``; the square of a complex number is real here."""
    if isinstance(g, torch.Tensor) and g.is_complex():
        g = g.abs()
    ops.addcmul_(v, g, g, value=value)
