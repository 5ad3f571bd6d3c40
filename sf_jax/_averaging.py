r"""The scalars of a step: its size, its bias corrections and its averaging weight.

.. math::

    lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
    lr_{max} &= \max(lr_{max}, lr_k) \\
    w_k &= (k+1)^r \, lr_{max}^{weight\_lr\_power} \\
    W_k &= W_{k-1} + w_k \\
    c_k &= w_k / W_k \quad\text{(0 while } W_k = 0\text{)}

One counter ``k`` serves the base step and the average; it is 0 at the first step.
All of it is at least float32, whatever the parameters are, and the weights carry
twice that (see :mod:`sf_jax._double`), so that ``c_k`` stays right to the last
digit for 1e8 steps.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sf_jax import _checks, _double
from sf_jax._double import Double, double, scalar_dtype


class Weights(NamedTuple):
    """What the average has to remember."""

    weight_sum: Double  # W, the sum of averaging weights
    lr_max: jax.Array  # () scalar_dtype(): the largest step size so far


Average = Callable[[jax.Array, Double, Weights], tuple[jax.Array, Weights]]
"""``(count, lr_k, weights) -> (c_k, weights)``: how much of z' enters x."""


def polynomial_average(
    r: jax.typing.ArrayLike = 0.0, weight_lr_power: jax.typing.ArrayLike = 2.0
) -> Average:
    """Weights ``(k+1)^r * lr_max^weight_lr_power``: the average of the paper's code.

    Args:
      r: power of the step number. 0 weighs all steps alike, 1 weighs late ones more.
      weight_lr_power: power of the largest step size so far; 2 keeps warmup steps
        out of the average, 0 weighs them like any other.
    """

    def average(
        count: jax.Array, lr: Double, weights: Weights
    ) -> tuple[jax.Array, Weights]:
        # Where lr is the largest so far, its own low part belongs to it.
        lr_max = _double.where(lr.hi >= weights.lr_max, lr, double(weights.lr_max))
        weight = _double.multiply(
            _double.power(_steps(count), r), _double.power(lr_max, weight_lr_power)
        )
        weight_sum = _double.add(weights.weight_sum, weight)
        ckp1 = jnp.where(weight_sum.hi > 0, _double.divide(weight, weight_sum).hi, 0.0)
        return ckp1, Weights(weight_sum, lr_max.hi)

    return average


def refined_average(
    c: jax.typing.ArrayLike,
    b1: optax.ScalarOrSchedule,
    r: jax.typing.ArrayLike = 0.0,
    weight_lr_power: jax.typing.ArrayLike = 2.0,
) -> Average:
    r"""Refined Schedule-Free: the length of the average apart from β.

    .. math::

        c_k = \min(1, (1 - \beta) \, C \, w_k / W_k)

    Args:
      c: C, the decoupling constant; ``1 / (1 - b1)`` gives the plain average, more
        weighs late steps more.
      b1: β, what the optimizer gets as its ``b1``: a float, an array or a schedule.
      r: as in :func:`polynomial_average`, whose ``w_k / W_k`` this scales.
      weight_lr_power: likewise.

    Returns:
      An averaging weight, for the ``average`` of any optimizer here.

    Raises:
      ValueError: a negative ``c``, ``b1`` outside [0, 1].

    Examples:
      >>> import sf_jax
      >>> average = sf_jax.refined_average(50.0, b1=0.95)
      >>> tx = sf_jax.schedule_free_adamw(0.01, b1=0.95, average=average)

    References:
      Song et al., *Through the River: Understanding the Benefit of Schedule-Free
        Methods for Language Model Training*, https://arxiv.org/abs/2507.09846
    """
    _checks.non_negative(
        "c", c, "the decoupling constant, 1 / (1 - b1) at its plainest"
    )
    _checks.interpolation("b1", b1)
    polynomial = polynomial_average(r, weight_lr_power)

    def average(
        count: jax.Array, lr: Double, weights: Weights
    ) -> tuple[jax.Array, Weights]:
        ckp1, weights = polynomial(count, lr, weights)
        factor = c * complement(b1(count) if callable(b1) else b1)
        return jnp.minimum(factor * ckp1, 1.0), weights

    return average


def exponential_average(mu_x: optax.ScalarOrSchedule = 0.9967) -> Average:
    r"""``c_k = 1 - μ_x``: an exponential moving average, as in primal averaging.

    Args:
      mu_x: weight of the old x in the new, in [0, 1]; a float, an array or a schedule
        of the count. ``1 - 1 / (k + 1)`` is the plain average of Schedule-Free.

    Returns:
      An averaging weight, for the ``average`` of any optimizer here.

    Raises:
      ValueError: ``mu_x`` outside [0, 1].

    Examples:
      >>> import sf_jax
      >>> average = sf_jax.exponential_average(0.99)
      >>> tx = sf_jax.schedule_free_sgd(0.5, average=average)

    References:
      Defazio et al., *Smoothing DiLoCo with Primal Averaging for Faster Training of
        LLMs*, https://arxiv.org/abs/2512.17131
    """
    _checks.interpolation("mu_x", mu_x, "the weight of the old x in the new")

    def average(
        count: jax.Array, lr: Double, weights: Weights
    ) -> tuple[jax.Array, Weights]:
        return complement(mu_x(count) if callable(mu_x) else mu_x), weights

    return average


def average_after(c_warmup: jax.typing.ArrayLike, average: Average) -> Average:
    """x is z for the first ``c_warmup`` steps, which add no weight to the average."""

    def delayed(
        count: jax.Array, lr: Double, weights: Weights
    ) -> tuple[jax.Array, Weights]:
        ckp1, later = average(count, lr, weights)
        warming = count < c_warmup
        weight_sum = _double.where(warming, weights.weight_sum, later.weight_sum)
        return jnp.where(warming, 1.0, ckp1), Weights(weight_sum, later.lr_max)

    return delayed


def scheduled(
    learning_rate: optax.ScalarOrSchedule,
    warmup_steps: jax.typing.ArrayLike | None = None,
) -> Callable[[jax.Array], Double]:
    """The step size as a function of ``count``, with the linear warmup in front."""

    def step_size(count: jax.Array) -> Double:
        lr = double(learning_rate(count) if callable(learning_rate) else learning_rate)
        if warmup_steps is None or (
            isinstance(warmup_steps, (int, float)) and warmup_steps == 0
        ):
            return lr
        steps, total = _steps(count), double(warmup_steps)
        return _double.where(
            steps.hi < total.hi,
            _double.multiply(lr, _double.divide(steps, total)),
            lr,
        )

    return step_size


def one_minus_power(b: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - b^(count + 1)``, the bias correction, without cancellation."""
    steps = (count + 1).astype(scalar_dtype())
    return -jnp.expm1(steps * log(b))


def log(b: jax.typing.ArrayLike) -> jax.Array:
    """``log b``, in double precision where b is a Python number."""
    if isinstance(b, (int, float)):
        return jnp.asarray(math.log(b) if b > 0 else -math.inf, scalar_dtype())
    return jnp.log1p(jnp.asarray(b, scalar_dtype()) - 1)


def complement(b: jax.typing.ArrayLike) -> jax.Array:
    """``1 - b``, in double precision where b is a Python number."""
    return jnp.asarray(1 - b, scalar_dtype())


def _steps(count: jax.Array) -> Double:
    """``k + 1``; added in float, since an int32 count may already be saturated."""
    return _double.add(double(count), double(1))
