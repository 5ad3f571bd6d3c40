"""Checks of params, gradients and states. Each error says what would be right.

Those of arguments are in :mod:`sf_jax._arguments`.
"""

from typing import Any

import jax
import jax.numpy as jnp


def dtype_of(leaf: Any) -> Any:
    """``jnp.result_type``, which takes its time even where a leaf says its dtype."""
    return leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)


def inexact_leaves(params: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        try:
            dtype = dtype_of(leaf)
        except TypeError:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {leaf!r}, which is no array. "
                "Leave such leaves out: of an Equinox model take "
                "eqx.filter(model, eqx.is_inexact_array)."
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}, which cannot "
                "be averaged. Leave such leaves out with optax.masked or "
                "optax.partition, and with eqx.filter(model, eqx.is_inexact_array) of "
                "an Equinox model."
            )


def same_structure(grads: Any, params: Any) -> None:
    """Gradients must fit params leaf by leaf; the first leaf that does not is named."""
    of_grads, of_params = jax.tree.structure(grads), jax.tree.structure(params)
    if of_grads != of_params:  # type: ignore[operator]
        missing = sorted(_names(params) - _names(grads))
        unexpected = sorted(_names(grads) - _names(params))
        difference = (
            f"missing {missing}, unexpected {unexpected}"
            if missing or unexpected
            else f"{of_grads} against {of_params}"
        )
        raise ValueError(
            f"the gradients' structure is not that of params: {difference}. "
            "Differentiate with respect to the params that you pass to update."
        )
    for (path, grad), param in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(grad) != jnp.shape(param):
            raise ValueError(
                f"the gradient of params{jax.tree_util.keystr(path)} has shape "
                f"{jnp.shape(grad)}, the parameter {jnp.shape(param)}. Differentiate "
                "with respect to the params that you pass to update."
            )


_OF_ANOTHER = (
    "The state was made by another optimizer, with other arguments (inner_momentum, "
    "mask) or from other params. Update it with what made it, or begin anew at x: "
    "init(sf_jax.eval_params(state, params))."
)


def kind_of_state(state: Any, kind: type) -> None:
    if not isinstance(state, kind):
        raise ValueError(
            f"update needs a {kind.__name__}, got a state of type "
            f"{type(state).__name__}. Pass what init returned; restore checkpoints "
            "into the structure of jax.eval_shape(init, params)."
        )


def same_leaves(name: str, found: Any, expected: Any) -> None:
    """A part of the state must have the leaves that this optimizer would make."""
    of_found, of_expected = _shapes(found), _shapes(expected)
    if of_found == of_expected:
        return
    differences = [
        f"{name}{path} is missing"
        if path not in of_found
        else f"{name}{path} is there and should not be"
        if path not in of_expected
        else f"{name}{path} has shape {of_found[path]} for {of_expected[path]}"
        for path in sorted(of_found.keys() | of_expected.keys())
        if of_found.get(path) != of_expected.get(path)
    ]
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    raise ValueError(
        f"the state does not fit this optimizer: {differences[0]}{more}. {_OF_ANOTHER}"
    )


def as_wide_as_before(lean: Any, z: Any, params: Any) -> None:
    """Where x is not stored the parameter must hold all of y."""
    for (path, is_lean), z_leaf, p in zip(
        jax.tree.leaves_with_path(lean),
        jax.tree.leaves(z),
        jax.tree.leaves(params),
        strict=True,
    ):
        dtype = jnp.result_type(p)
        if is_lean and jnp.finfo(dtype).bits < jnp.finfo(z_leaf.dtype).bits:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is {dtype}, narrower than z in "
                f"the state ({z_leaf.dtype}): it does not determine x, which the state "
                "does not hold. Before the params are rounded, put it there: "
                "state._replace(x=sf_jax.eval_params(state, params))."
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _names(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}
