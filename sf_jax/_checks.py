"""Checks of arguments. Each error quotes the value and says what would be right.

Only concrete Python and NumPy numbers are checked. Under
``optax.inject_hyperparams`` every number arrives as an array, often traced, whose
value cannot be read here.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_number(value: Any) -> bool:
    """Whether value is a plain number, not an array, a schedule or None."""
    return isinstance(value, (numbers.Real, np.number))


def is_zero(value: Any) -> bool:
    """Whether value is known to be zero now; a tracer is not."""
    if isinstance(value, jax.core.Tracer) or callable(value):
        return False
    return bool(np.all(np.asarray(value) == 0))


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


def state_dtype(value: Any) -> None:
    if value is not None and not jnp.issubdtype(value, jnp.floating):
        raise ValueError(
            f"state_dtype must be a floating dtype, got {value}. Leave it out to keep "
            "z at least in float32."
        )


def inexact_leaves(params: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {dtype}, which cannot "
                "be averaged. Leave such leaves out with optax.masked or "
                "optax.partition."
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


def _names(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}
