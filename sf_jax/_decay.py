"""Decoupled weight decay, at y, z or x, and the masks that say of which leaves."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sf_jax import _checks
from sf_jax._schedule_free import Iterates, like, widen

Mask = Any | Callable[[optax.Params], Any]
"""Which leaves decay: a prefix tree of bools, or a function of params giving one."""


def is_function(tree_or_function: Any) -> bool:
    """Whether the argument is a function that returns a tree, and not itself a tree.

    An Equinox module is a tree that is callable as a whole. Its leaves are arrays or
    bools, which are not callable, while a function is its own only leaf.
    """
    return callable(tree_or_function) and all(
        map(callable, jax.tree.leaves(tree_or_function))
    )


def decaying(mask: Mask | None, params: optax.Params) -> Any:
    """A bool for each leaf of params, which are the parameters as the user has them."""
    if mask is None:
        mask = True
    elif is_function(mask):
        mask = mask(params)
    return jax.tree.broadcast(mask, params)


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

    def decay(d: jax.Array, p: jax.Array, decays: bool) -> jax.Array:
        return d + like(weight_decay, d) * widen(p) if decays else d

    return jax.tree.map(
        decay, direction, iterates.at(decay_at), decaying(mask, iterates.params)
    )
