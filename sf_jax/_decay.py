"""Decoupled weight decay, at y, z or x, and the masks that say of which leaves."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sf_jax import _arguments
from sf_jax._schedule_free import Iterates, like, widen

Mask = Any | Callable[[optax.Params], Any]
"""Which leaves decay: a prefix tree of bools, or a function of params giving one."""


def decaying(mask: Mask | None, params: optax.Params, name: str = "mask") -> Any:
    """A bool for each leaf of params, which are the parameters as the user has them."""
    mask = True if mask is None else mask
    return _arguments.fitted(name, mask, params, _arguments.BOOLS)


def add_decay(
    direction: optax.Updates,
    iterates: Iterates,
    weight_decay: jax.typing.ArrayLike | None,
    decay_at: str,
    mask: Mask | None,
) -> optax.Updates:
    """``direction + λ p``, where p is y, z or x before the step."""
    if weight_decay is None or _arguments.is_off(weight_decay):
        return direction

    def decay(d: jax.Array, p: jax.Array, decays: bool) -> jax.Array:
        return d + like(weight_decay, d) * widen(p) if decays else d

    return jax.tree.map(
        decay, direction, iterates.at(decay_at), decaying(mask, iterates.params)
    )
