"""Decoupled weight decay, taken at y, z or x."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sf_jax import _checks
from sf_jax._schedule_free import Iterates, like, widen

Mask = Any | Callable[[optax.Params], Any]
"""Which leaves decay: a prefix tree of bools, or a function of params giving one."""


def add_decay(
    direction: optax.Updates,
    iterates: Iterates,
    weight_decay: jax.typing.ArrayLike | None,
    decay_at: str,
    mask: Mask | None,
) -> optax.Updates:
    """``direction + λ p``, where p is y, z or x before the step."""
    if weight_decay is None or (_checks.is_number(weight_decay) and weight_decay == 0):
        return direction
    at = iterates.at(decay_at)
    if mask is None:
        mask = True
    elif callable(mask):
        mask = mask(at)

    def decay(d: jax.Array, p: jax.Array, decays: bool) -> jax.Array:
        return d + like(weight_decay, d) * widen(p) if decays else d

    return jax.tree.map(decay, direction, at, jax.tree.broadcast(mask, direction))
