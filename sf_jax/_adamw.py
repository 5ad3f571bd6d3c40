r"""Schedule-Free AdamW and its published variants.

.. math::

    v &= b_2 v + (1 - b_2) |g|^2 \\
    z' &= z - lr_k \left( \frac{\hat g}{\sqrt{v / (1 - b_2^{k+1})} + \epsilon}
          + \lambda p \right)

with :math:`\hat g = g`, or with ``inner_momentum`` b

.. math::

    m = b m + (1 - b) g, \qquad \hat g = m / (1 - b^{k+1})

The variants put the bias correction :math:`\sqrt{1 - b_2^{k+1}}` elsewhere and leave
the denominator at :math:`\sqrt v + \epsilon`:

- ``"paper"`` multiplies it into lr_k, so that the averaging weight sees it too;
- ``"algoperf"``, the winner of the self-tuning track of the AlgoPerf competition,
  multiplies it into the whole displacement but not into the averaging weight, decays
  at x unless told otherwise, and keeps lr_k at eps or above;
- ``"algoperf_v2"``, the entry that its authors handed in later, is the same with decay
  at y;
- ``"adamc"``, for :mod:`sf_jax._plus` only, scales the decay by lr_k once more.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  https://github.com/facebookresearch/schedule_free (the variants)
  https://github.com/mlcommons/submissions_algorithms (both entries:
    ``schedule_free_adamw`` and ``schedule_free_adamw_v2``)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sf_jax import _arguments, _averaging, _double
from sf_jax._averaging import Average, complement, one_minus_power
from sf_jax._decay import Mask, add_decay
from sf_jax._double import Double, double
from sf_jax._rounding import NEAREST, Rounding, rounding_of
from sf_jax._schedule_free import (
    Base,
    Iterates,
    downhill,
    leaf_dtype,
    like,
    of_count,
    rule,
    widen,
    zeros_of,
)

ALGOPERF = ("algoperf", "algoperf_v2")


class AdamWState(NamedTuple):
    """The moments of the gradient at y."""

    # like z, real, moment_dtype or at least float32: v, the running mean of |g|²
    nu: optax.Params
    # like z, moment_dtype or at least float32: m, the running mean of g;
    # optax.MaskedNode without momentum
    mu: optax.Params


def init_moments(
    z: optax.Params,
    inner_momentum: jax.typing.ArrayLike | None,
    moment_dtype: jax.typing.DTypeLike | None,
) -> AdamWState:
    def first(z: jax.Array) -> jax.Array:
        return zeros_of(z, leaf_dtype(z, moment_dtype))

    def second(z: jax.Array) -> jax.Array:
        return zeros_of(z, jnp.finfo(leaf_dtype(z, moment_dtype)).dtype)

    return AdamWState(
        nu=jax.tree.map(second, z),
        mu=optax.MaskedNode()
        if _arguments.is_off(inner_momentum)
        else jax.tree.map(first, z),
    )


def update_moments(
    grads: optax.Updates,
    moments: AdamWState,
    b2: jax.typing.ArrayLike,
    inner_momentum: jax.typing.ArrayLike | None,
    count: jax.Array,
    rounding: Rounding = NEAREST,
    in_place: bool = False,
) -> AdamWState:
    """The moments after a step; ``in_place`` is explained at :func:`in_place_mean`."""
    # Each coefficient is computed once, and not for every leaf.
    share = complement(b2)

    # v + (1 - b) (g² - v), not b v + (1 - b) g²: rounded to float32, b and 1 - b do
    # not add up to 1, and over the memory of v the difference adds up too.
    def mean(moment: jax.Array, value: jax.Array, share: jax.Array) -> jax.Array:
        wide = widen(moment)
        return wide + like(share, wide) * (value - wide)

    def mean_square(g: jax.Array, nu: jax.Array) -> jax.Array:
        if in_place and is_narrow(nu, g):
            return in_place_mean(nu, g, b2)
        return mean(nu, abs_squared(g), share)

    # Whoever divides by the root of v takes it as it was rounded: with bfloat16 moments
    # a TPU then makes one fusion of the step.
    nu = jax.tree.map(mean_square, grads, moments.nu)
    nu = rounding.tree(nu, moments.nu, "v", count)
    if inner_momentum is None or _arguments.is_off(inner_momentum):
        return AdamWState(nu, moments.mu)
    share_of_mu = complement(inner_momentum)
    mu = jax.tree.map(lambda g, mu: mean(mu, widen(g), share_of_mu), grads, moments.mu)
    return AdamWState(nu, rounding.tree(mu, moments.mu, "m", count))


def numerator(
    grads: optax.Updates,
    moments: AdamWState,
    inner_momentum: jax.typing.ArrayLike | None,
    count: jax.Array,
) -> optax.Updates:
    """ĝ: the gradient, or its bias-corrected running mean."""
    if inner_momentum is None or _arguments.is_off(inner_momentum):
        return jax.tree.map(widen, grads)
    correction = one_minus_power(inner_momentum, count)
    return jax.tree.map(lambda mu: widen(mu) / like(correction, widen(mu)), moments.mu)


def denominator(
    nu: jax.Array, correction: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """``sqrt(v / correction) + eps``"""
    nu = widen(nu)
    return root(nu / like(correction, nu)) + like(positive_eps(eps, nu.dtype), nu)


def is_narrow(nu: jax.Array, g: jax.Array) -> bool:
    """Whether v has fewer digits than the arithmetic of its step."""
    return jnp.finfo(nu.dtype).bits < jnp.finfo(widen(g).dtype).bits


def in_place_mean(nu: jax.Array, g: jax.Array, b2: jax.typing.ArrayLike) -> jax.Array:
    """``b2 v + (1 - b2) |g|²``, of which both the product and the sum are rounded.

    The AlgoPerf entry scales a bfloat16 v in place and then adds to it in place, and
    PyTorch rounds what each operation stores. The two roundings are a large part of
    what v becomes: b2 = 0.9955 takes off about one unit in the last place of it.
    """
    square = abs_squared(g)
    kept = rounded_to(like(b2, square) * nu.astype(square.dtype), nu)
    return kept + like(complement(b2), square) * square


def in_place_denominator(
    nu: jax.Array, eps: jax.typing.ArrayLike, g: jax.Array
) -> jax.Array:
    """``sqrt(v) + eps``, of which both the root and the sum are rounded."""
    some = rounded_to(root(nu.astype(jnp.finfo(g.dtype).dtype)), nu)
    return rounded_to(some + like(positive_eps(eps, nu.dtype), some), nu)


def rounded_to(value: jax.Array, narrow: jax.Array) -> jax.Array:
    """The value with no more digits than an array has, in its own dtype.

    Not by two conversions, which XLA leaves out where it is allowed excess precision.
    """
    info = jnp.finfo(narrow.dtype)
    return jax.lax.reduce_precision(value, info.nexp, info.nmant)


# Compiled, so that it is traced once for all leaves of one shape.
@partial(jax.jit, inline=True)
def root(v: jax.Array) -> jax.Array:
    """``sqrt(v)``, differentiable where v is 0.

    The derivative of sqrt at 0 is infinite, and infinity times the derivative of v,
    which is 0, is NaN. Here it is 0: v is 0 only while all gradients have been 0.
    """
    positive = v > 0
    # Not jnp.where, which makes a call in a call of it and an integer of 0.
    some = jax.lax.select(positive, v, jax.lax.full_like(v, 1))
    return jax.lax.select(positive, jnp.sqrt(some), jax.lax.full_like(v, 0))


def positive_eps(
    eps: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.typing.ArrayLike:
    """eps, but at least the root of the smallest normal v of this dtype.

    While all gradients are 0, so is v, and 0 / 0 is NaN. And a gradient may be so small
    that its square is 0: over anything less, it would throw z far off.
    """
    least = math.sqrt(jnp.finfo(dtype).tiny)
    if _arguments.is_number(eps):
        return max(float(eps), least)  # type: ignore[arg-type]
    return jnp.maximum(eps, least)


def abs_squared(g: jax.Array) -> jax.Array:
    g = widen(g)
    return jnp.square(g.real) + jnp.square(g.imag) if jnp.iscomplexobj(g) else g * g


def adamw_base(
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    inner_momentum: jax.typing.ArrayLike | None,
    weight_decay: jax.typing.ArrayLike | None,
    decay_at: str,
    mask: Mask | None,
    moment_dtype: jax.typing.DTypeLike | None,
    variant: str = "standard",
    rounding: Rounding = NEAREST,
) -> Base:
    in_place = variant in ALGOPERF and rounding.seed is None

    def update(
        grads: optax.Updates,
        moments: AdamWState,
        iterates: Iterates,
        count: jax.Array,
        lr: jax.Array,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, AdamWState]:
        moments = update_moments(
            grads, moments, b2, inner_momentum, count, rounding, in_place
        )
        correction, decay = one_minus_power(b2, count), weight_decay
        if variant in ALGOPERF:
            lr = lr * jnp.sqrt(correction)
        if variant in ("paper", *ALGOPERF):
            correction = jnp.ones_like(correction)
        if variant == "adamc" and not _arguments.is_off(weight_decay):
            decay = lr * jnp.asarray(weight_decay)

        def adam(g: jax.Array, nu: jax.Array) -> jax.Array:
            if in_place and is_narrow(nu, g):
                return g / in_place_denominator(nu, eps, g)
            return g / denominator(nu, correction, eps)

        direction = jax.tree.map(
            adam, numerator(grads, moments, inner_momentum, count), moments.nu
        )
        direction = add_decay(direction, iterates, decay, decay_at, mask)
        return downhill(direction, lr), moments

    return Base(lambda z: init_moments(z, inner_momentum, moment_dtype), update)


@_arguments.checked(decay_at=_arguments.DECAY_AT_OR_NONE)
def schedule_free_adamw(
    learning_rate: optax.ScalarOrSchedule = 0.0025,
    warmup_steps: int | None = None,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float = 0.0,
    inner_momentum: float | None = None,
    decay_at: str | None = None,
    mask: Mask | None = None,
    average: Average | None = None,
    store_x: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
    variant: str = "standard",
    rounding: str = "nearest",
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-Free AdamW.

    .. math::

        lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
        v &= b_2 v + (1 - b_2) |g|^2 \\
        z' &= z - lr_k \left( \frac{g}{\sqrt{v / (1 - b_2^{k+1})} + \epsilon}
              + \lambda p \right) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    Args:
      learning_rate: step size; a float, an array or a schedule of the count. Good
        values are 1 to 10 times those of AdamW with a schedule.
      warmup_steps: steps of linear warmup; None or 0 for none.
      b1: β, the weight of x in y, in [0, 1]; a float, an array or a schedule. It
        takes the place of momentum; long runs often want 0.95 or 0.98. A schedule
        that reaches 0 needs ``store_x=True``.
      b2: decay rate of the second moment v, in [0, 1).
      eps: added to the root of v.
      weight_decay: λ, decoupled and times the learning rate.
      weight_lr_power: steps are weighed by the largest learning rate so far to this
        power; 2 keeps warmup out of the average.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      r: steps are also weighed by ``(k + 1) ** r``.
      inner_momentum: decay rate of a first moment in the numerator, in [0, 1); None
        or 0 for the plain gradient, which keeps no first moment.
      decay_at: "y", "z" or "x": what the decay pulls towards zero by; None for "y",
        or for "x" with ``variant="algoperf"``, as in its entry.
      mask: which leaves decay: a prefix tree of bools or a function of params giving
        one; None for all.
      average: another averaging weight: :func:`~sf_jax.refined_average`,
        :func:`~sf_jax.exponential_average`, or your own, as :func:`schedule_free` has
        it; None for the weighted mean.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      moment_dtype: dtype of the moments; None for that of each
        parameter, at least float32, whatever ``state_dtype`` is. In bfloat16 a slow
        mean stands still: what a step adds is rounded away. v is computed in float32
        and rounded once, but for the AlgoPerf variants. Their first entry kept v in
        bfloat16 and moved it by PyTorch's in-place operations, each of which computes
        in float32 and rounds what it stores. So with R for rounding to
        ``moment_dtype``, to nearest, v becomes ``R(R(b2 v) + (1 - b2) g g)`` and the
        denominator is ``R(R(sqrt(v)) + eps)``. This is another trajectory than a
        float32 v has.
      variant: where the bias correction :math:`\sqrt{1 - b_2^{k+1}}` stands:
        "standard" (in the denominator, as above), "paper" (a factor of lr_k, which
        the averaging weight sees too), "algoperf" or "algoperf_v2" (a factor of the
        displacement alone). In all but the first the denominator is
        :math:`\sqrt v + \epsilon`.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=jnp.bfloat16``: y (of bfloat16 params), z, x, and the moments
        where ``moment_dtype`` is bfloat16 too. Rounded at random, small steps are not
        lost. The random bits depend on ``seed``, the count and the place of an element
        alone; within ``shard_map`` that is its place in the shard.
      seed: from 0 to 2^32 - 1, of the random bits. The state does not hold it: a run
        that goes on needs the same one for the same bits.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``; its updates have
      the params' structure and dtypes.

    Raises:
      ValueError: b1, b2 or ``inner_momentum`` out of range, a negative learning rate,
        eps, weight decay or number of steps, an unknown ``decay_at``, ``variant`` or
        ``rounding``, a seed out of range, or ``rounding="stochastic"`` with another
        ``state_dtype`` than bfloat16.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_adamw(0.1, warmup_steps=10)
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
    """
    if decay_at is None:
        decay_at = "x" if variant == "algoperf" else "y"
    _averaging.check_average(average, r, weight_lr_power)
    at_random = rounding_of(rounding, seed, state_dtype)
    step_size = _averaging.scheduled(learning_rate, warmup_steps)
    if variant == "paper":
        step_size = _with_bias_correction(step_size, b2)
    elif variant in ALGOPERF:
        step_size = _at_least(step_size, eps)
    return rule(
        adamw_base(
            b2,
            eps,
            inner_momentum,
            weight_decay,
            decay_at,
            mask,
            moment_dtype,
            variant,
            at_random,
        ),
        of_count(step_size),
        _averaging.polynomial_mean(r, weight_lr_power),
        b1,
        average=average,
        state_dtype=state_dtype,
        store_x=store_x,
        rounding=at_random,
    )


def _with_bias_correction(
    step_size: Callable[[jax.Array], Double], b2: jax.typing.ArrayLike
) -> Callable[[jax.Array], Double]:
    return lambda count: _double.multiply(
        step_size(count), double(jnp.sqrt(one_minus_power(b2, count)))
    )


def _at_least(
    step_size: Callable[[jax.Array], Double], least: jax.typing.ArrayLike
) -> Callable[[jax.Array], Double]:
    def bounded(count: jax.Array) -> Double:
        lr, bound = step_size(count), double(least)
        return _double.where(lr.hi >= bound.hi, lr, bound)

    return bounded
