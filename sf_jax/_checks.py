"""Checks of arguments. Each error quotes the value and says what would be right.

Only concrete Python and NumPy numbers are checked. Under
``optax.inject_hyperparams`` every number arrives as an array, often traced, whose
value cannot be read here.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_number(value: Any) -> bool:
    """Whether value is a plain number, not an array, a schedule or None."""
    return isinstance(value, (numbers.Real, np.number))


def is_off(value: Any) -> bool:
    """Whether value is None or the number 0, and so can never become anything else.

    An array that holds 0 does not count: what a state holds must not depend on values
    that are unknown under ``jit``.
    """
    return value is None or (is_number(value) and value == 0)


def interpolation(
    name: str,
    value: Any,
    meaning: str = "the weight of x in y (usually 0.9 to 0.98)",
) -> None:
    if is_number(value) and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}. It is {meaning}.")


def decay_rate(name: str, value: Any) -> None:
    if is_number(value) and not 0 <= value < 1:
        raise ValueError(
            f"{name} must lie in [0, 1), got {value}. It is the decay rate of a "
            "moving average (usually 0.9 to 0.999)."
        )


def non_negative(name: str, value: Any, meaning: str) -> None:
    if is_number(value) and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}. It is {meaning}.")


def finite(name: str, value: Any, meaning: str) -> None:
    if is_number(value) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}. It is {meaning}.")


def learning_rate(value: Any) -> None:
    non_negative(
        "learning_rate",
        value,
        "the step size; updates already point downhill, so give its magnitude",
    )


def weight_decay(value: Any) -> None:
    non_negative(
        "weight_decay", value, "the pull towards zero, times the learning rate"
    )


def eps(value: Any) -> None:
    non_negative("eps", value, "added to a square root in the denominator")


def steps(name: str, value: Any) -> None:
    if is_number(value):
        # Trainers that read their arguments from a command line pass 100.0.
        if value % 1 != 0:
            raise TypeError(
                f"{name} must be a whole number, got {value}. It counts steps; for a "
                "share of the run, give that share times the number of its steps."
            )
        non_negative(name, value, "a number of steps; 0 turns it off")


def warmup_steps(value: Any) -> None:
    steps("warmup_steps", value)


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
        )


def axis_name(value: Any) -> None:
    names = (value,) if value is None or isinstance(value, str) else value
    if not isinstance(names, (tuple, list, set, frozenset)) or not all(
        isinstance(name, str) or name is value for name in names
    ):
        raise TypeError(
            f"axis_name must be the name of a mesh axis or a tuple of names, got "
            f"{value!r}. It says which axes of shard_map to sum over."
        )


def floating_dtype(name: str, value: Any) -> None:
    if value is not None and not jnp.issubdtype(value, jnp.inexact):
        raise ValueError(
            f"{name} must be a floating dtype, got {value}. Leave it out for float32 "
            "or wider."
        )


def starts_above_zero(name: str, schedule: Any) -> None:
    """A schedule's value at 0 must not be 0; one that is traced cannot be read."""
    with jax.ensure_compile_time_eval():
        start = schedule(jnp.zeros((), jnp.int32))
        is_zero = not isinstance(start, jax.core.Tracer) and bool(start == 0)
    if is_zero:
        raise ValueError(
            f"{name} is a schedule that begins at 0, where y does not determine x. "
            "Build the optimizer with store_x=True."
        )


def inexact_leaves(params: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        try:
            dtype = jnp.result_type(leaf)
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
