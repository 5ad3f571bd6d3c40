"""Moments of an optax optimizer kept in a narrower dtype than they are computed in.

The moments of an optax optimizer have the dtype of the params that its ``init`` sees,
and optax names a dtype for the first of them only.
"""

from typing import Any

import jax
import optax

from sf_jax._schedule_free import leaf_dtype, widen

# Fields of optax's states that are running means, and of RowState.
_NAMES = {"mu", "nu", "v", "exp_avg", "exp_avg_sq"}


def with_moment_dtype(
    transformation: optax.GradientTransformation,
    moment_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, whose moments are rounded to moment_dtype after each step."""
    transformation = optax.with_extra_args_support(transformation)
    if moment_dtype is None:
        return transformation

    def narrow(state: Any) -> Any:
        return _map_moments(lambda m: m.astype(leaf_dtype(m, moment_dtype)), state)

    def init(params: optax.Params) -> optax.OptState:
        return narrow(transformation.init(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide = _map_moments(widen, state)
        updates, state = transformation.update(updates, wide, params, **extra_args)
        return updates, narrow(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _map_moments(fn: Any, state: optax.OptState) -> optax.OptState:
    def apply(path: tuple[Any, ...], leaf: Any) -> Any:
        is_moment = any(getattr(entry, "name", None) in _NAMES for entry in path)
        return fn(leaf) if is_moment else leaf

    return jax.tree.map_with_path(apply, state)
