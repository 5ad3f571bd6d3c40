"""A few steps on noise, to see whether an optimizer as a whole does what its parts say.

A chain that ends in ``optax.scale(-1)`` is right around Adam, whose updates are
directions, and climbs around a Schedule-Free optimizer, whose updates already lead to
the next y. Nothing in a lean state tells. In a rehearsal the state holds x from the
beginning, so that the y of every step is known.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sf_jax._eval import check_params, find_states
from sf_jax._schedule_free import ScheduleFreeState

# z has to move twice: in the first step x, y and z are still one. With accumulation, or
# a learning rate that begins at 0, it moves late.
_MOVES = 2
_CALLS = 300


def check_optimizer(optimizer: Any, params: optax.Params, **extra_args: Any) -> None:
    r"""Raises where something behind the Schedule-Free optimizer changes its updates.

    It takes steps on noise, from ``params`` and with a state of its own, until z has
    moved twice, and sees after each whether the parameters are

    .. math::

        y = (1 - \beta) z + \beta x

    Call it once, before training and outside of ``jit``. It compiles ``update``, and
    needs memory for one more state with x. :func:`~sf_jax.check_params` looks at a run
    that is under way instead.

    Args:
      optimizer: an optax transformation, whole, as it is going to be used: the chain,
        the partition, what skips or accumulates steps.
      params: where training begins. They stay as they are.
      extra_args: what ``update`` gets besides, such as ``value=1.0``.

    Raises:
      ValueError: parameters that are not y, with the leaf and the distance; no
        Schedule-Free optimizer inside; z that did not move in 300 calls.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> sgd = sf_jax.schedule_free_sgd(0.1)
      >>> sf_jax.check_optimizer(optax.chain(optax.clip(1.0), sgd), jnp.ones(2))
      >>> sf_jax.check_optimizer(optax.chain(sgd, optax.scale(-1.0)), jnp.ones(2))
      Traceback (most recent call last):
        ...
      ValueError: params are not the y that the state expects: ...

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    state = _with_x(optimizer.init(params))

    @jax.jit
    def step(params: Any, state: Any, key: Any, extra_args: Any) -> Any:
        grads = _noise(key, params)
        updates, after = optimizer.update(grads, state, params, **extra_args)
        pairs = zip(find_states(state), find_states(after), strict=True)
        moved = jnp.array([_differs(old.z, new.z) for old, new in pairs]).any()
        return optax.apply_updates(params, updates), after, moved

    check_params(state, params)  # raises where there is no Schedule-Free state
    moves = 0
    for key in jax.random.split(jax.random.key(0), _CALLS):
        params, state, moved = step(params, state, key, extra_args)
        check_params(state, params)
        moves += bool(moved)
        if moves == _MOVES:
            return
    raise ValueError(
        f"z moved {moves} times in {_CALLS} calls, so that this optimizer cannot be "
        "checked. Check it with a learning rate above 0, and with fewer batches to "
        "accumulate."
    )


def _with_x(state: Any) -> Any:
    """The state before the first step, with x, which is z there, beside every z."""

    def stored(node: Any) -> Any:
        if not isinstance(node, ScheduleFreeState):
            return node
        return node._replace(x=jax.tree.map(jnp.copy, node.z))

    return jax.tree.map(
        stored, state, is_leaf=lambda node: isinstance(node, ScheduleFreeState)
    )


def _noise(key: jax.Array, params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(1, len(leaves)))
    noise = [
        jax.random.normal(key, jnp.shape(leaf), jnp.result_type(leaf))
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        else jnp.zeros_like(leaf)
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, noise)


def _differs(a: Any, b: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.array([False, *(jnp.any(x != y) for x, y in pairs)]).any()
