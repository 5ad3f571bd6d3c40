r"""The rule that every Schedule-Free optimizer shares, and its state.

With the base optimizer's displacement ``u``, the averaging weight ``c`` and the
interpolation ``β`` (``β'`` for the next step),

.. math::

    z' &= z + u \\
    x' &= (1 - c) x + c z' \\
    y' &= (1 - \beta') z' + \beta' x'

Gradients are taken at **y**, which the live parameters hold; **x** is evaluated and
shipped. x is not stored where it can be recovered from y and z:

.. math::

    x = y + \frac{1 - \beta}{\beta} (y - z)

Eliminating x gives the *lean* update, with :math:`e = (\beta - \beta') / \beta`,
which is 0 while β is constant:

.. math::

    y' - y = (c + e (1 - c)) (z - y) + (1 - \beta' (1 - c)) (z' - z)

An optimizer is a choice for four seams: the base step (:class:`Base`), the step
size (:class:`StepSize`), the averaging weight (:data:`~sf_jax._averaging.Mean`, and
:data:`~sf_jax._averaging.Average` where it is not that of a weighted mean)
and the interpolation (a function of the count). The rule does not know which
optimizer it serves.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sf_jax import _arguments, _averaging, _checks, _double, _memory, _meshes
from sf_jax._arguments import checked
from sf_jax._averaging import Average, Mean, Weights, once
from sf_jax._double import Double, double, scalar_dtype
from sf_jax._rounding import (
    NEAREST,
    LeanNumbers,
    Rounding,
    lean_y,
    numbered,
    share_of_z,
)

LEAST_B1 = 1 / 64
"""The least β with which y and z give x: the error of a y is 1 / β as large in x."""


class ScheduleFreeState(NamedTuple):
    """What is remembered between steps, besides the live parameters y.

    ``scalar`` stands for float32, or float64 where x64 is on. A leaf of z has the
    dtype of the parameter, float32 where that is narrower, or ``state_dtype``.
    """

    # () int32: steps taken; stops at its largest value
    count: jax.Array  # type: ignore[assignment]  # tuples have a method of this name
    b1: jax.Array  # () scalar: β, the interpolation that formed the present y
    weight_ratio: jax.Array  # () scalar: W / w, averaging weights over the latest
    weight_ratio_lo: jax.Array  # () scalar: what rounding left over of it
    lr_max: jax.Array  # () scalar: the largest step size so far
    z: optax.Params  # like params: the base optimizer's iterate
    # like z: the average; optax.MaskedNode, for a leaf or all, where y and z give it
    x: optax.Params
    base_state: optax.OptState  # the base optimizer's own, moments at least float32
    step_size_state: optax.OptState  # empty for a step size that depends on count only


@dataclasses.dataclass(frozen=True)
class Iterates:
    """y, z and x before a step, which base steps and step sizes may read."""

    y: optax.Params  # like z
    z: optax.Params
    stored_x: optax.Params  # like z; optax.MaskedNode for a leaf that is recovered
    b1: jax.Array
    params: optax.Params  # y in the parameters' own dtype

    @property
    def x(self) -> optax.Params:
        lean = any(map(is_lean, jax.tree.leaves(self.stored_x, is_leaf=is_lean)))
        way = recovery(self.b1) if lean else None
        return jax.tree.map(
            lambda z, y, x: recover_x(y, z, way) if is_lean(x) else x,
            self.z,
            self.y,
            self.stored_x,
        )

    def at(self, name: str) -> optax.Params:
        """The sequence that ``name`` says: "x", "y" or "z"."""
        return getattr(self, name)


class Base(NamedTuple):
    """How z moves."""

    # z -> state, each leaf of which lies where its leaf of z lies
    init: Callable[[optax.Params], optax.OptState]
    # (grads, state, iterates, count, lr, extra_args) -> (u, state); u contains -lr
    update: Callable[
        [optax.Updates, optax.OptState, Iterates, jax.Array, jax.Array, dict[str, Any]],
        tuple[optax.Updates, optax.OptState],
    ]
    # state after the step -> the factor that it put on lr, for a base that finds its
    # own step size; the averaging weight sees it too
    lr_scale: Callable[[optax.OptState], jax.typing.ArrayLike] | None = None


class StepSize(NamedTuple):
    """``lr_k``, which the base step and the averaging weight both see."""

    init: Callable[[optax.Params], optax.OptState]  # z -> state
    # (state, count, grads, iterates, extra_args) -> (lr, state)
    update: Callable[
        [optax.OptState, jax.Array, optax.Updates, Iterates, dict[str, Any]],
        tuple[Double, optax.OptState],
    ]


class ByWeight(NamedTuple):
    """β from the averaging weight, in place of a number or a function of the count.

    x is then what y and z imply with the β of the present step, although another formed
    y: where β grows, x comes nearer to z by as much.
    """

    first: float  # β of the first y, above 0
    of: Callable[[jax.Array, jax.Array], jax.Array]  # (count, ckp1) -> β


def of_count(step_size: Callable[[jax.Array], Double]) -> StepSize:
    """A step size that depends on the count alone."""
    return StepSize(
        lambda params: (),
        lambda state, count, grads, iterates, extra: (step_size(count), state),
    )


def rule(
    base: Base,
    step_size: StepSize,
    mean: Mean,
    b1: optax.ScalarOrSchedule | ByWeight,
    *,
    average: Average | None = None,
    state_dtype: jax.typing.DTypeLike | None = None,
    store_x: bool = False,
    rounding: Rounding = NEAREST,
) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer from the four seams; every public optimizer calls this."""
    by_weight = b1 if isinstance(b1, ByWeight) else None
    beta: optax.ScalarOrSchedule = b1.first if isinstance(b1, ByWeight) else b1
    needs_x = not callable(beta) and may_lose_x(beta)

    def next_b1(count: jax.Array) -> jax.typing.ArrayLike:
        return _arguments.at("b1", beta, count)

    def init(params: optax.Params) -> ScheduleFreeState:
        _checks.inexact_leaves(params)
        if isinstance(average, _averaging.Exponential) and callable(average.mu_x):
            _arguments.begins_within("mu_x", average.mu_x)
        keeps_x = store_x or needs_x
        if callable(beta):
            _arguments.b1_within(beta, 0.0 if keeps_x else LEAST_B1, 1.0)
        z = jax.tree.map(lambda p: _copy(p, leaf_dtype(p, state_dtype)), params)
        x = jax.tree.map(
            lambda z, p: (
                _copy(p, z.dtype) if keeps_x or _is_master(z, p) else optax.MaskedNode()
            ),
            z,
            params,
        )
        if not keeps_x and not jax.tree.leaves(x):
            # One node instead of one for each leaf: optax.tree_map_params maps specs
            # over params, and a spec has no counterpart to an empty node.
            x = optax.MaskedNode()
        zero = jnp.zeros((), scalar_dtype())
        count = jnp.zeros((), jnp.int32)
        return ScheduleFreeState(
            count=count,
            # Copied, because inject_hyperparams holds the same buffer in its own
            # state, and one buffer cannot be donated twice.
            b1=_copy(next_b1(count), scalar_dtype()),
            weight_ratio=zero,
            weight_ratio_lo=zero.copy(),
            lr_max=zero.copy(),
            z=z,
            x=x,
            base_state=base.init(z),
            step_size_state=step_size.init(z),
        )

    def update(
        grads: optax.Updates,
        state: ScheduleFreeState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScheduleFreeState]:
        if params is None:
            raise ValueError(
                "update needs params, the live parameters y: call "
                "update(grads, state, params)."
            )
        check(state, params)
        _checks.same_structure(grads, params)
        grads = jax.tree.map(lambda z, g: as_dtype(g, leaf_dtype(z)), state.z, grads)
        stored_x = per_leaf(state.x, state.z)
        y = jax.tree.map(
            # The parameter is y itself, or a rounded copy of it.
            lambda z, p, x: (
                recover_y(x, z, state.b1) if _is_master(z, p) else as_array(p)
            ),
            state.z,
            params,
            stored_x,
        )
        iterates = Iterates(y, state.z, stored_x, state.b1, params)

        lr, step_size_state = step_size.update(
            state.step_size_state, state.count, grads, iterates, extra_args
        )
        lr = once(state.count, lr)
        displacement, base_state = base.update(
            grads, state.base_state, iterates, state.count, lr.hi, extra_args
        )
        if base.lr_scale is not None:
            scale = _arguments.scalar("lr_scale", base.lr_scale(base_state))
            lr = _double.multiply(lr, double(scale))
        ckp1, weights = mean(
            state.count,
            lr,
            Weights(Double(state.weight_ratio, state.weight_ratio_lo), state.lr_max),
        )
        b1_of_y, b1_of_x = next_b1(state.count), state.b1
        is_any_lean = any(jax.tree.leaves(_lean_leaves(state)))
        if callable(beta) and is_any_lean:
            # A schedule that init could not look at, or not at every count.
            b1_of_y = jnp.maximum(b1_of_y, LEAST_B1)
        if by_weight is not None:
            b1_of_y = b1_of_x = by_weight.of(state.count, ckp1)
            share_of_x = once(state.count, state.b1 / b1_of_y)
            stored_x = jax.tree.map(
                lambda z, x: x if is_lean(x) else _nearer(x, z, share_of_x),
                state.z,
                stored_x,
            )
        if average is not None:
            share = average(state.count, lr.hi, b1_of_y, ckp1)
            ckp1 = jnp.asarray(_arguments.scalar("average", share), scalar_dtype())
        ckp1 = once(state.count, ckp1)
        if is_any_lean:
            # Computed only where needed: they divide by β, which may be 0 where x is
            # stored.
            lean_coefficients = once(
                state.count, _lean_coefficients(ckp1, b1_of_y, b1_of_x)
            )
            off_t = lean_coefficients[0].astype(jnp.float32)
            z_in_t = jnp.asarray(b1_of_y * ckp1, jnp.float32)
            shares = share_of_z(state.b1), share_of_z(b1_of_y)
            numbers_in_digits = LeanNumbers(*once(state.count, shares), z_in_t, off_t)

        def move_z(leaf: int, z: jax.Array, u: jax.Array) -> jax.Array:
            return rounding(widen(z) + widen(u), z.dtype, "z", leaf, state.count)

        def move_x(leaf: int, z: jax.Array, x: jax.Array) -> jax.Array:
            if is_lean(x):
                return x
            x, z, dtype = widen(x), widen(z), z.dtype
            next_x = x + like(ckp1, x) * (z - x)
            return rounding(next_x, dtype, "x", leaf, state.count)

        def move_y(
            leaf: int, z: jax.Array, next_z: jax.Array, p: jax.Array, next_x: jax.Array
        ) -> jax.Array:
            dtype = jnp.result_type(p)
            if is_lean(next_x) and rounding.is_random(dtype):
                y, z, next_z = widen(p), widen(z), widen(next_z)
                next_y = lean_y(y, z, next_z, numbers_in_digits)
            elif is_lean(next_x):
                # Through z' - z and not through u, its equal on paper: then a TPU
                # makes one fusion of the step, with no array beyond inputs and outputs.
                z, next_z, y = widen(z), widen(next_z), widen(p)
                z_coefficient, step_coefficient = lean_coefficients
                way = like(z_coefficient, y) * (z - y) + like(step_coefficient, y) * (
                    next_z - z
                )
                return as_dtype(way, dtype)
            else:
                b1_wide = jnp.asarray(b1_of_y, scalar_dtype())
                next_y = recover_y(widen(next_x), widen(next_z), b1_wide)
            # The update leads from p to y' as rounded to p's dtype, so that rounding
            # errors of p do not accumulate over steps.
            next_y = rounding(next_y, dtype, "y", leaf, state.count)
            return (widen(next_y) - widen(p)).astype(dtype)

        places = numbered(state.z)
        z = jax.tree.map(move_z, places, state.z, displacement)
        x = jax.tree.map(move_x, places, z, stored_x)
        updates = jax.tree.map(move_y, places, state.z, z, params, x)
        return updates, ScheduleFreeState(
            count=_one_more(state.count),
            b1=jnp.asarray(b1_of_y, scalar_dtype()),
            weight_ratio=weights.ratio.hi,
            weight_ratio_lo=weights.ratio.lo,
            lr_max=weights.lr_max,
            z=z,
            x=state.x if is_lean(state.x) else x,
            base_state=base_state,
            step_size_state=step_size_state,
        )

    def check(state: ScheduleFreeState, params: optax.Params) -> None:
        """Raises if this optimizer cannot continue from a state that another made."""
        _checks.kind_of_state(state, ScheduleFreeState)
        _checks.same_leaves("z", state.z, params)
        z = jax.tree.map(
            lambda z: jax.ShapeDtypeStruct(jnp.shape(z), leaf_dtype(z)), state.z
        )
        for name, found, init in (
            ("base_state", state.base_state, base.init),
            ("step_size_state", state.step_size_state, step_size.init),
        ):
            _checks.same_leaves(name, found, jax.eval_shape(init, z))
        lean = _lean_leaves(state)
        if any(jax.tree.leaves(lean)):
            if needs_x:
                raise ValueError(
                    "the state does not hold x, which a b1 near 0 needs, and so does "
                    "one in an array. Pass a number above 0 (inject_hyperparams: "
                    'static_args=("b1",)), or state._replace(x=sf_jax.eval_params('
                    "state, params))."
                )
            _checks.as_wide_as_before(lean, state.z, params)

    return optax.GradientTransformationExtraArgs(init, update)


@checked()
def schedule_free(
    base_optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float = 0.0,
    average: Average | None = None,
    decay_at: str = "y",
    lr_scale: Callable[[Any], jax.typing.ArrayLike] | None = None,
    store_x: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-Free over any optax optimizer.

    ``base_optimizer`` moves z with the gradients taken at y; x is the weighted mean
    of all z:

    .. math::

        z' &= z + u \\
        x' &= (1 - c) x + c z' \\
        y' &= (1 - \beta) z' + \beta x'

    Args:
      base_optimizer: any optax transformation, its learning rate included. It should
        have no momentum of its own: β takes that part.
      learning_rate: a float, an array or a schedule of the count: what weighs the
        average (the base optimizer has its own). Give both the same schedule.
      b1: β, the weight of x in y, in [0, 1]; a float, an array or a schedule. A
        schedule that reaches 0 needs ``store_x=True``.
      weight_lr_power: steps are weighed by the largest learning rate so far to this
        power; 2 keeps warmup out of the average.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it. A complex one means its real part where the parameter
        is real. The base sees z, and makes its moments, at least in float32.
      r: steps are also weighed by ``(k + 1) ** r``.
      average: another averaging weight, a function ``(count, lr, b1, ckp1) -> c`` of
        scalars: the steps taken before this one, the step size, β, and the weight of
        this step in the mean that ``r`` and ``weight_lr_power`` describe. c is the
        weight of z' in x', in [0, 1]. :func:`~sf_jax.refined_average`,
        :func:`~sf_jax.exponential_average`, or your own; None for ``ckp1`` itself.
      decay_at: "y", "z" or "x": what ``base_optimizer`` gets as its params, and so
        what its weight decay pulls towards zero by.
      lr_scale: for a ``base_optimizer`` that finds its own step size: the factor on
        ``learning_rate`` that its state holds after a step.
      store_x: keep x in the state (one more array a leaf), so that ``eval_params``
        needs no params. x is always kept for parameters narrower than z and where b1
        is below 1/64 or an array, which may become 0: y does not give it then. Under
        ``optax.inject_hyperparams`` all numbers are arrays; ``static_args=("b1",)``
        leaves x out. ``optax.tree_map_params`` cannot know the parameters' dtypes:
        where they are narrower than z, let it have ``store_x=True``.

    Returns:
      An optax transformation. Its updates have the params' structure and dtypes and
      move them from y to the next y; its state is a :class:`ScheduleFreeState`.
      ``update`` needs ``params`` and hands further keyword arguments to the base. Put
      it last in ``optax.chain``: what comes after it moves y without z knowing (see
      :func:`~sf_jax.check_params`). Frozen parameters are another part of an
      ``optax.partition``.

    Raises:
      ValueError: b1 outside [0, 1], a negative learning rate, a state_dtype that is
        not floating, an unknown ``decay_at``; in ``init`` leaves that are not
        floating, or a b1 that begins at 0 without ``store_x``; in ``update`` params
        missing, gradients that do not fit them, or a state that another optimizer
        made and this one cannot go on from.

    Examples:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free(optax.rmsprop(0.05), learning_rate=0.05)
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> params = jnp.zeros(2)  # y
      >>> state = tx.init(params)
      >>> # Donate params and state, and return them in the SAME ORDER: XLA pairs the
      >>> # buffers as they come, and copies them where the pairs do not fit.
      >>> @partial(jax.jit, donate_argnums=(0, 1))
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(400):
      ...     params, state = step(params, state)
      >>> x = sf_jax.eval_params(state, params)
      >>> bool(loss(x) < 1e-2)
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    return over(
        base_optimizer,
        learning_rate,
        b1,
        weight_lr_power,
        state_dtype,
        r=r,
        average=average,
        decay_at=decay_at,
        lr_scale=lr_scale,
        store_x=store_x,
    )


def over(
    base_optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule | ByWeight,
    weight_lr_power: float,
    state_dtype: jax.typing.DTypeLike | None,
    *,
    r: float,
    average: Average | None,
    decay_at: str,
    lr_scale: Callable[[Any], jax.typing.ArrayLike] | None = None,
    store_x: bool,
) -> optax.GradientTransformationExtraArgs:
    """:func:`schedule_free`, whose arguments have been checked."""
    _averaging.check_average(average, r, weight_lr_power)
    transformation = optax.with_extra_args_support(base_optimizer)
    base_update = _meshes.auto(transformation.update)

    def init(z: optax.Params) -> optax.OptState:
        # Copied, because some optimizers keep their initial params or an injected
        # number in their state, and one buffer cannot be donated twice.
        return jax.tree.map(jnp.copy, transformation.init(z))

    def update(
        grads: optax.Updates,
        state: optax.OptState,
        iterates: Iterates,
        count: jax.Array,
        lr: jax.Array,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, optax.OptState]:
        params = _widened(iterates.at(decay_at))
        return base_update(grads, state, params, **extra_args)

    return rule(
        Base(beside_z(init), update, lr_scale),
        of_count(_averaging.scheduled(learning_rate)),
        _averaging.polynomial_mean(r, weight_lr_power),
        b1,
        average=average,
        state_dtype=state_dtype,
        store_x=store_x,
    )


def recovery(b1: jax.Array) -> jax.Array:
    """``(1 - β) / β``, for :func:`recover_x`."""
    return (1 - b1) / b1


# Compiled, so that outside of jit a leaf is one call and not one for each operation.
@partial(jax.jit, inline=True)
def recover_x(y: jax.Array, z: jax.Array, recovery: jax.Array) -> jax.Array:
    """``x = y + ((1 - β) / β) (y - z)``, in y's dtype."""
    y_wide, z_wide = widen(y), widen(z)
    return as_dtype(y_wide + like(recovery, y_wide) * (y_wide - z_wide), y.dtype)


def recover_y(x: jax.Array, z: jax.Array, b1: jax.Array) -> jax.Array:
    """``y = x + (1 - β) (z - x)``, in z's dtype."""
    x_wide, z_wide = widen(x), widen(z)
    return as_dtype(x_wide + like(1 - b1, x_wide) * (z_wide - x_wide), z.dtype)


def _nearer(x: jax.Array, z: jax.Array, share: jax.Array) -> jax.Array:
    """``z + share (x - z)``, wide."""
    x, z = widen(x), widen(z)
    return z + like(share, x) * (x - z)


def widen(leaf: jax.Array) -> jax.Array:
    """The leaf in the dtype for arithmetic: its own, at least float32."""
    return as_dtype(leaf, leaf_dtype(leaf))


def as_array(leaf: Any) -> jax.Array:
    """``jnp.asarray``, which takes its time even where there is nothing to do."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def as_dtype(array: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """``jnp.asarray`` with a dtype, as :func:`as_array`."""
    return array if _has_dtype(array, dtype) else jnp.asarray(array, dtype)


def _has_dtype(
    array: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
) -> TypeGuard[jax.Array]:
    """Whether it is a JAX array of this dtype, and not of a weak type."""
    return isinstance(array, jax.Array) and array.dtype == dtype and not array.weak_type


def _one_more(count: jax.Array) -> jax.Array:
    """At its largest value the count stays.

    optax's function for it has a new name since 0.2.4, and AlgoPerf pins 0.2.2.
    """
    return count + (count < jnp.iinfo(count.dtype).max).astype(count.dtype)


def may_lose_x(b1: Any) -> bool:
    """Whether y may not determine x: for a b1 near 0, or an array, which may hold 0."""
    return not _arguments.is_number(b1) or bool(b1 < LEAST_B1)


def is_lean(x: Any) -> bool:
    """Whether a leaf of the state's x, or the whole tree x, is not stored."""
    return isinstance(x, optax.MaskedNode)


def per_leaf(x: optax.Params, z: optax.Params) -> optax.Params:
    """For each leaf of z the stored x, or a MaskedNode where x is not stored."""
    return jax.tree.broadcast(x, z, is_leaf=is_lean)


def leaf_dtype(
    leaf: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike | None = None
) -> jax.typing.DTypeLike:
    """The dtype of state for a leaf: this one, or the leaf's but at least float32.

    Complex for complex leaves and real for real ones, whichever of them dtype is.
    """
    own = _checks.dtype_of(leaf)
    if dtype is None:
        # Not by promotion, which float8 and strict modes have none of.
        return own if jnp.finfo(own).bits >= 32 else jnp.dtype(jnp.float32)
    real = jnp.finfo(dtype).dtype
    is_complex = jnp.issubdtype(own, jnp.complexfloating)
    return jnp.promote_types(real, jnp.complex64) if is_complex else real


def like(scalar: jax.typing.ArrayLike, leaf: jax.Array) -> Any:
    """The scalar in the leaf's real dtype; float64 scalars must not promote leaves.

    An array of JAX's, or of NumPy's where the scalar is a number of Python.
    """
    dtype = jnp.finfo(leaf.dtype).dtype
    # A number needs no operation then, which every leaf would trace anew.
    if _arguments.is_number(scalar):
        return np.asarray(scalar, dtype)
    return as_dtype(scalar, dtype)


def downhill(direction: optax.Updates, lr: jax.Array) -> optax.Updates:
    """``u = -lr d`` for each leaf."""
    factor = -lr
    return jax.tree.map(lambda d: like(factor, d) * d, direction)


def _lean_coefficients(
    ckp1: jax.Array,
    b1: jax.typing.ArrayLike,
    b1_before: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The coefficients of (z - y) and of (z' - z) in the lean update."""
    # e is exactly 0 while β is constant. The β that formed y is read from the state,
    # since an optimizer with another β may have made the state.
    e = (b1_before - b1) / b1_before
    step_coefficient = _averaging.complement(b1) + b1 * ckp1
    return ckp1 + e * (1 - ckp1), step_coefficient


def _lean_leaves(state: ScheduleFreeState) -> Any:
    """For each leaf of z, whether x is not stored."""
    return jax.tree.map(lambda z, x: is_lean(x), state.z, per_leaf(state.x, state.z))


def _widened(tree: optax.Params) -> optax.Params:
    return jax.tree.map(widen, tree)


def zeros_of(z: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Zeros in the shape of a leaf, which lie where the leaf lies."""
    return _memory.beside(_zeros(_memory.on_device(z), jnp.dtype(dtype)), z)


# Compiled, so that outside of jit a leaf is one call and not one for each operation.
@partial(jax.jit, inline=True, static_argnums=1)
def _zeros(z: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """0 for each element of z, computed of z: no number is less than itself.

    Plain zeros depend on nothing, so under jit the compiler gives every device all of
    them, although a device has but a part of z. The compiler does not know that the
    comparison is always false. (jax.experimental.shard_alike is made for this, but in
    JAX 0.10 it places all leaves of one shape alike.)
    """
    z = z.real if jnp.iscomplexobj(z) else z
    return jax.lax.lt(z, z).astype(dtype)


def beside_z(
    init: Callable[[optax.Params], optax.OptState],
) -> Callable[[optax.Params], optax.OptState]:
    """An optax ``init`` as a :class:`Base` has it.

    It sees z in the device's memory and at least in float32, and each leaf of its state
    goes where the leaf of z lies that it is named after.
    """
    return lambda z: _placed_like(z, init(_widened(jax.tree.map(_memory.on_device, z))))


def _placed_like(z: optax.Params, state: optax.OptState) -> optax.OptState:
    by_path = dict(jax.tree.leaves_with_path(z))

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        for start in range(len(path) + 1):
            param = by_path.get(path[start:])
            if param is not None and _covers(jnp.shape(param), jnp.shape(leaf)):
                if isinstance(param, jax.core.Tracer) and param.ndim:
                    leaf = _plus_nothing(_memory.on_device(param), leaf)
                return _memory.beside(leaf, param)
        return leaf

    return jax.tree.map_with_path(place, state)


# Compiled, so that it is traced once for all leaves of one shape.
@jax.jit
def _plus_nothing(param: jax.Array, leaf: jax.Array) -> jax.Array:
    """The same leaf, as a sum of which a part is computed of param."""
    # Means of rows have size 1 where the leaf has more.
    summed = tuple(axis for axis, size in enumerate(leaf.shape) if size == 1)
    nothing = jnp.any(_zeros(param, jnp.bool), axis=summed, keepdims=True)
    return leaf + nothing.astype(leaf.dtype)


def _covers(shape: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether part is shape, or shape with some sizes replaced by 1."""
    return shape == part or (
        len(shape) == len(part)
        and all(p in (1, size) for size, p in zip(shape, part, strict=True))
    )


def _is_master(z: jax.Array, param: jax.Array) -> bool:
    """Whether z is wider than the parameter, which is then a rounded copy of y."""
    return jnp.finfo(_checks.dtype_of(param)).bits < jnp.finfo(z.dtype).bits


def _copy(leaf: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    # Copied, because donating the params would otherwise free the state's buffer.
    return leaf.copy() if _has_dtype(leaf, dtype) else jnp.array(leaf, dtype, copy=True)
