r"""The scalars of a step: its size, its bias corrections and its averaging weight.

.. math::

    lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
    lr_{max} &= \max(lr_{max}, lr_k) \\
    w_k &= (k+1)^r \, lr_{max}^{weight\_lr\_power} \\
    W_k &= W_{k-1} + w_k \\
    c_k &= w_k / W_k \quad\text{(0 while } W_k = 0\text{)}

One counter ``k`` serves the base step and the average; it is 0 at the first step.
All of it is at least float32, whatever the parameters are.

w and W leave the range of float32 soon, with r = 10 after 7,000 steps. So the sum is
kept in units of the latest weight, as :math:`R_k = W_k / w_k`:

.. math::

    R_k &= 1 + R_{k-1} w_{k-1} / w_k, \qquad c_k = 1 / R_k \\
    \log \frac{w_{k-1}}{w_k} &= r \log \frac{k}{k+1}
        + weight\_lr\_power \, \log \frac{lr_{max,k-1}}{lr_{max,k}}

R carries twice the digits of a float (see :mod:`sf_jax._double`), so that ``c_k``
stays right to the last digit for 1e8 steps.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from sf_jax import _arguments, _double
from sf_jax._double import Double, double, scalar_dtype


class Weights(NamedTuple):
    """What the average has to remember."""

    ratio: Double  # R: the sum of averaging weights over the latest of them
    lr_max: jax.Array  # () scalar_dtype(): the largest step size so far


# The largest R that is kept; c_k = 1 / R no longer moves x then.
_NEVER_LEFT = 1e30

Scalars = TypeVar("Scalars")  # a tree of them

Mean = Callable[[jax.Array, Double, Weights], tuple[jax.Array, Weights]]
"""``(count, lr_k, weights) -> (w_k / W_k, weights)``: a weighted mean of all z."""

Average = Callable[
    [jax.Array, jax.Array, jax.typing.ArrayLike, jax.Array], jax.typing.ArrayLike
]
"""``(count, lr, b1, ckp1) -> c_k``: the share of z' in x', in place of ``ckp1``.

All are scalars. ``count`` is the number of steps taken before this one, int32. ``lr``
is the step size lr_k. ``b1`` is β of the y that this step forms. ``ckp1`` is the share
in the weighted mean, ``w_k / W_k``, with the optimizer's ``r`` and ``weight_lr_power``.
"""


def polynomial_mean(
    r: jax.typing.ArrayLike = 0.0, weight_lr_power: jax.typing.ArrayLike = 2.0
) -> Mean:
    """The mean with weights ``(k+1)^r * lr_max^weight_lr_power``, the paper's.

    Args:
      r: power of the step number. 0 weighs all steps alike, 1 weighs late ones more.
      weight_lr_power: power of the largest step size so far; 2 keeps warmup steps
        out of the mean, 0 weighs them like any other.
    """

    def mean(
        count: jax.Array, lr: Double, weights: Weights
    ) -> tuple[jax.Array, Weights]:
        # Where lr is the largest so far, its own low part belongs to it.
        lr_max = _double.where(lr.hi >= weights.lr_max, lr, double(weights.lr_max))
        shrink = _weight_before(count, weights.lr_max, lr_max.hi, r, weight_lr_power)
        # Not times 1 + shrink: XLA makes 1 + expm1(a) one exp(a), of half the digits.
        before = _double.add(
            weights.ratio, _double.multiply(weights.ratio, double(shrink))
        )
        weight = _latest_weight(lr_max, weight_lr_power)
        ratio = _double.add(before, weight)
        # Weights that fall, as with r < 0, let it grow without end.
        ratio = _double.where(ratio.hi < _NEVER_LEFT, ratio, double(_NEVER_LEFT))
        some = ratio.hi > 0
        ckp1 = _double.divide(weight, _double.where(some, ratio, double(1.0))).hi
        return jnp.where(some, ckp1, 0.0), Weights(ratio, lr_max.hi)

    return mean


def mean_after(c_warmup: jax.typing.ArrayLike, mean: Mean) -> Mean:
    """A mean that begins after ``c_warmup`` steps; until then x equals z."""

    def delayed(
        count: jax.Array, lr: Double, weights: Weights
    ) -> tuple[jax.Array, Weights]:
        ckp1, later = mean(count, lr, weights)
        warming = count < c_warmup
        ratio = _double.where(warming, weights.ratio, later.ratio)
        return jnp.where(warming, 1.0, ckp1), Weights(ratio, later.lr_max)

    return delayed


@_arguments.checked()
def refined_average(c: jax.typing.ArrayLike) -> Average:
    r"""Refined Schedule-Free: the length of the average apart from β.

    .. math::

        c_k = \min(1, (1 - \beta) \, C \, w_k / W_k)

    β, and ``r`` and ``weight_lr_power`` of the weights :math:`w_k`, are those of the
    optimizer that gets this as its ``average``.

    Args:
      c: C, the decoupling constant, a float or an array; ``1 / (1 - b1)`` gives the
        plain average, more weighs late steps more.

    Returns:
      An averaging weight, for the ``average`` of any optimizer here.

    Raises:
      ValueError: a negative ``c``.

    Examples:
      >>> import sf_jax
      >>> average = sf_jax.refined_average(50.0)
      >>> tx = sf_jax.schedule_free_adamw(0.01, b1=0.95, average=average)

    References:
      Song et al., *Through the River: Understanding the Benefit of Schedule-Free
        Methods for Language Model Training*, https://arxiv.org/abs/2507.09846
    """

    def average(
        count: jax.Array,
        lr: jax.Array,
        b1: jax.typing.ArrayLike,
        ckp1: jax.Array,
    ) -> jax.Array:
        return jnp.minimum(_scalar(c) * complement(b1) * ckp1, 1.0)

    return average


@_arguments.checked()
def exponential_average(mu_x: optax.ScalarOrSchedule = 0.9967) -> Average:
    r"""``c_k = 1 - μ_x``: an exponential moving average, as in primal averaging.

    Args:
      mu_x: weight of the old x in the new, in [0, 1]; a float, an array or a schedule
        of the count. ``1 - 1 / (k + 1)`` is the plain average of Schedule-Free.

    Returns:
      An averaging weight, for the ``average`` of any optimizer here. It weighs steps
      by nothing but their age: ``r`` and ``weight_lr_power`` beside it are an error.

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
    return Exponential(mu_x)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """An :data:`Average` that can be told from those that look at ``ckp1``."""

    mu_x: optax.ScalarOrSchedule

    def __call__(
        self,
        count: jax.Array,
        lr: jax.Array,
        b1: jax.typing.ArrayLike,
        ckp1: jax.Array,
    ) -> jax.Array:
        return complement(_arguments.at("mu_x", self.mu_x, count))


def check_average(
    average: Average | None,
    r: jax.typing.ArrayLike,
    weight_lr_power: jax.typing.ArrayLike,
) -> None:
    """Refuses powers of weights beside an average that has no weights."""
    if not isinstance(average, Exponential):
        return
    for name, value, default in (("r", r, 0), ("weight_lr_power", weight_lr_power, 2)):
        # Arrays are not looked at: inject_hyperparams makes them of defaults too.
        if _arguments.is_number(value) and value != default:
            raise ValueError(
                f"{name} = {value} has no meaning for exponential_average, which does "
                f"not weigh steps. Leave {name} out, or use a schedule as mu_x."
            )


def scheduled(
    learning_rate: optax.ScalarOrSchedule,
    warmup_steps: jax.typing.ArrayLike | None = None,
) -> Callable[[jax.Array], Double]:
    """The step size as a function of ``count``, with the linear warmup in front."""

    def step_size(count: jax.Array) -> Double:
        lr = double(_arguments.at("learning_rate", learning_rate, count))
        if warmup_steps is None or (
            isinstance(warmup_steps, int) and warmup_steps == 0
        ):
            return lr
        # At least 1, since 0 may be injected and is not to be divided by.
        steps, total = _steps(count), double(jnp.maximum(warmup_steps, 1))
        return _double.where(
            steps.hi < total.hi,
            _double.multiply(lr, _double.divide(steps, total)),
            lr,
        )

    return step_size


def once(count: jax.Array, scalars: Scalars) -> Scalars:
    """The same scalars, computed once in a step and not anew for every leaf.

    XLA fuses what is cheap into the loops of every leaf that wants it, and the numbers
    of a step are more to compile than all that happens to the leaf. A division is not
    cheap to it. This one is by 1 and exact, which XLA does not know. Optimization
    barriers do not help: XLA for CPUs takes them away before it fuses.
    """
    one = jnp.where(count < 0, 2, 1)
    return jax.tree.map(lambda scalar: scalar / one.astype(scalar.dtype), scalars)


def schedule(step_size: Callable[[jax.Array], Double]) -> optax.Schedule:
    """A step size as the learning rate of an optax optimizer."""
    return lambda count: once(count, step_size(count).hi)


def one_minus_power(b: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - b^(count + 1)``, the bias correction, without cancellation."""
    return -jnp.expm1(steps_taken(count) * log(b))


def steps_taken(count: jax.typing.ArrayLike) -> jax.Array:
    """``count + 1``, this step included; in float, since an int32 may be at its end."""
    return jnp.asarray(count, scalar_dtype()) + 1


def log(b: jax.typing.ArrayLike) -> jax.Array:
    """``log b``, computed in double precision where b is a Python number."""
    if isinstance(b, (int, float)):
        return jnp.asarray(math.log(b) if b > 0 else -math.inf, scalar_dtype())
    return jnp.log1p(jnp.asarray(b, scalar_dtype()) - 1)


def complement(b: jax.typing.ArrayLike) -> jax.Array:
    """``1 - b``, computed in double precision where b is a Python number."""
    return jnp.asarray(1 - b, scalar_dtype())


def _weight_before(
    count: jax.Array,
    lr_max_before: jax.Array,
    lr_max: jax.Array,
    r: jax.typing.ArrayLike,
    weight_lr_power: jax.typing.ArrayLike,
) -> jax.Array:
    """``w_{k-1} / w_k - 1``, a small number in most steps, right to its own digits.

    It may be any finite number where nothing has had weight: then what it is
    multiplied by is 0.
    """
    log_ratio = jnp.zeros((), scalar_dtype())
    if not _is_known_zero(r):
        log_ratio += _scalar(r) * jnp.log1p(-1 / jnp.maximum(steps_taken(count), 2))
    if not _is_known_zero(weight_lr_power):
        log_ratio += _scalar(weight_lr_power) * _log_quotient(lr_max_before, lr_max)
    # A weight so far below the one before is as good as 0, and e^80 fits a float32.
    return jnp.expm1(jnp.minimum(log_ratio, 80.0))


def _log_quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """``log(a / b)`` for 0 <= a <= b; 0 where a is. Finite slopes everywhere."""
    known = a > 0
    a, b = jnp.where(known, a, 1), jnp.where(known, b, 1)
    quotient = jnp.maximum(a / b, jnp.finfo(b.dtype).tiny)
    # Where they are near, the difference is exact and the quotient is not.
    near = jnp.log1p(-jnp.minimum((b - a) / b, 0.5))
    return jnp.where(quotient > 0.5, near, jnp.log(quotient))


def _latest_weight(lr_max: Double, weight_lr_power: jax.typing.ArrayLike) -> Double:
    """``w_k`` in units of ``(k+1)^r lr_max.hi^power``: 1, but for the part in lo."""
    if _is_known_zero(weight_lr_power):
        return double(1.0)
    power, positive = _scalar(weight_lr_power), lr_max.hi > 0
    # To first order, and positive for the largest of powers too.
    rest = power * (lr_max.lo / jnp.where(positive, lr_max.hi, 1))
    rest = jnp.clip(rest, -0.5, 0.5)
    one = jnp.where(positive | (power == 0), jnp.ones_like(rest), 0)
    return Double(one, rest)


def _is_known_zero(value: jax.typing.ArrayLike) -> bool:
    return _arguments.is_number(value) and bool(value == 0)


def _scalar(value: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(value, scalar_dtype())


def _steps(count: jax.Array) -> Double:
    """``k + 1`` with all its digits."""
    return _double.add(double(count), double(1))
