r"""Schedule-Free RAdam: the variance of early steps is rectified, without warmup.

With :math:`t = k + 1` and :math:`\rho_\infty = 2 / (1 - b_2) - 1`,

.. math::

    \rho = \rho_\infty - \frac{2 t b_2^t}{1 - b_2^t}

Where :math:`\rho > 4` the step is that of AdamW with

.. math::

    lr_k = lr \sqrt{\frac{(\rho - 4) (\rho - 2) \rho_\infty}
                         {(\rho_\infty - 4) (\rho_\infty - 2) \rho}}

else lr_k is 0 (``silent_sgd_phase``), or lr with the plain gradient as direction.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond*,
    https://arxiv.org/abs/1908.03265 (the rectification)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sf_jax import _averaging, _double
from sf_jax._adamw import AdamWState, denominator, init_moments, update_moments
from sf_jax._arguments import checked
from sf_jax._averaging import Average, complement, one_minus_power, steps_taken
from sf_jax._decay import Mask, add_decay
from sf_jax._double import Double, double, scalar_dtype
from sf_jax._rounding import NEAREST, Rounding, rounding_of
from sf_jax._schedule_free import Base, Iterates, downhill, of_count, rule, widen

# L(h) = coth h - 1/h as a series: coefficients of h, h³, h⁵, ...
_LANGEVIN = (
    1 / 3,
    -1 / 45,
    2 / 945,
    -1 / 4725,
    2 / 93555,
    -1382 / 638512875,
    4 / 18243225,
)


def rho(b2: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """ρ, the length of the average that v stands for; ρ∞ minus a nearly equal number.

    With a = -log b2 and L(h) = coth h - 1/h, it equals L(a/2) + t (1 - L(a t/2)), in
    which nothing cancels.
    """
    steps = steps_taken(count)
    a = -_averaging.log(b2)
    return (1 - _one_minus_langevin(a / 2)) + steps * _one_minus_langevin(a * steps / 2)


def _one_minus_langevin(h: jax.Array) -> jax.Array:
    small = jnp.minimum(h, 0.25)
    series = small * jnp.polyval(
        jnp.asarray(_LANGEVIN[::-1], scalar_dtype()), small * small
    )
    large = jnp.maximum(h, 0.25)
    # 2 / expm1(2 h), by powers that vanish and do not overflow.
    closed = 1 / large + 2 * jnp.exp(-2 * large) / jnp.expm1(-2 * large)
    return jnp.where(h < 0.25, 1 - series, closed)


def rectification(b2: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """The factor on lr where ρ > 4, else 0."""
    now = rho(b2, count)
    rho_inf = 2 / complement(b2) - 1
    rectified = now > 4
    # Where the factor is not used, ρ and ρ∞ are replaced by 5, because the root below
    # has no finite derivative for ρ <= 4. Where it is used, ρ∞ > ρ > 4.
    now = jnp.where(rectified, now, 5)
    rho_inf = jnp.where(rectified, rho_inf, 5)
    factor = (now - 4) / (rho_inf - 4) * ((now - 2) / (rho_inf - 2)) * (rho_inf / now)
    return jnp.where(rectified, jnp.sqrt(factor), 0)


def radam_base(
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike | None,
    mask: Mask | None,
    moment_dtype: jax.typing.DTypeLike | None,
    rounding: Rounding = NEAREST,
) -> Base:
    def update(
        grads: optax.Updates,
        moments: AdamWState,
        iterates: Iterates,
        count: jax.Array,
        lr: jax.Array,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, AdamWState]:
        moments = update_moments(grads, moments, b2, None, count, rounding)
        correction = one_minus_power(b2, count)
        rectified = rho(b2, count) > 4

        def radam(g: jax.Array, nu: jax.Array) -> jax.Array:
            divisor = denominator(nu, correction, eps)
            return widen(g) / jnp.where(rectified, divisor, jnp.ones_like(divisor))

        direction = add_decay(
            jax.tree.map(radam, grads, moments.nu), iterates, weight_decay, "y", mask
        )
        return downhill(direction, lr), moments

    return Base(lambda z: init_moments(z, None, moment_dtype), update)


@checked()
def schedule_free_radam(
    learning_rate: optax.ScalarOrSchedule = 0.0025,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float = 0.0,
    silent_sgd_phase: bool = True,
    mask: Mask | None = None,
    average: Average | None = None,
    store_x: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-Free RAdam, which needs no warmup.

    With :math:`t = k + 1` and the length of the average behind v,

    .. math::

        \rho_\infty = \frac{2}{1 - b_2} - 1, \qquad
        \rho = \rho_\infty - \frac{2 t b_2^t}{1 - b_2^t}

    the step where :math:`\rho > 4` is

    .. math::

        lr_k &= lr \sqrt{\frac{(\rho - 4) (\rho - 2) \rho_\infty}
                              {(\rho_\infty - 4) (\rho_\infty - 2) \rho}} \\
        z' &= z - lr_k \left( \frac{g}{\sqrt{v / (1 - b_2^{k+1})} + \epsilon}
              + \lambda y \right)

    Args:
      learning_rate: step size; a float, an array or a schedule of the count.
      b1: β, the weight of x in y, in [0, 1]; a float, an array or a schedule. A
        schedule that reaches 0 needs ``store_x=True``.
      b2: decay rate of the second moment v, in [0, 1). Below 0.6 no step is ever
        rectified.
      eps: added to the root of v.
      weight_decay: λ, decoupled, times the learning rate, at y.
      weight_lr_power: steps are weighed by the largest learning rate so far to this
        power.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      r: steps are also weighed by ``(k + 1) ** r``.
      silent_sgd_phase: whether the first steps, in which v stands for too few
        gradients (five with b2 = 0.999), move nothing. If not, they are SGD steps.
      mask: which leaves decay: a prefix tree of bools or a function of params giving
        one; None for all.
      average: another averaging weight: :func:`~sf_jax.refined_average`,
        :func:`~sf_jax.exponential_average`, or your own, as :func:`schedule_free` has
        it; None for the weighted mean.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      moment_dtype: dtype of v; None for that of each
        parameter, at least float32, whatever ``state_dtype`` is. In bfloat16 a slow
        mean stands still: what a step adds is rounded away.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=jnp.bfloat16``, and ``seed``: as in
        :func:`~sf_jax.schedule_free_adamw`.
      seed: from 0 to 2^32 - 1, of the random bits.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``; its updates have
      the params' structure and dtypes.

    Raises:
      ValueError: b1 or b2 out of range, a negative learning rate, eps or weight decay,
        or a ``rounding`` or ``seed`` that cannot be.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_radam(0.5)
      >>> params = jnp.array([3.0, -2.0])  # y
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     grads = 2 * params  # of |y|^2
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(sf_jax.eval_params(state, params)) < 0.2)
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
      Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond*,
        https://arxiv.org/abs/1908.03265
    """
    _averaging.check_average(average, r, weight_lr_power)
    at_random = rounding_of(rounding, seed, state_dtype)
    scheduled = _averaging.scheduled(learning_rate)

    def step_size(count: jax.Array) -> Double:
        lr = scheduled(count)
        rectified = _double.multiply(lr, double(rectification(b2, count)))
        if silent_sgd_phase:
            return rectified
        return _double.where(rho(b2, count) > 4, rectified, lr)

    return rule(
        radam_base(b2, eps, weight_decay, mask, moment_dtype, at_random),
        of_count(step_size),
        _averaging.polynomial_mean(r, weight_lr_power),
        b1,
        average=average,
        state_dtype=state_dtype,
        store_x=store_x,
        rounding=at_random,
    )
