r"""ScheduleFree+: no schedule and no learning rate to tune; the loss sets the step.

With the loss :math:`f` at y, and sums over all parameters (and all devices that
hold parts of them),

.. math::

    I &= \beta_k \sum g \cdot (z - x) \\
    e &= p \, e + (1 - p) \sqrt{\pi / 2} \sum |g|, \qquad
    \hat e = e / (1 - p^{k+1}) \\
    lr_k &= \max(lr, \epsilon) \, \max(0, f - f_{low} + I) / \hat e

and :math:`lr_k = 0` where the loss is not finite. :math:`f_{low}` is the least loss
that is thought possible, 0 in the paper. The base step is AdamW's with
momentum, whose decay is scaled by :math:`lr_k` twice (AdamC), the average begins after
``c_warmup`` steps, and β may grow:

.. math::

    1 - \beta_k = (1 - \beta_0)^{1 - s} (1 - \beta_{max})^s, \qquad
    s = \min(1, k / anneal\_steps)

References:
  Defazio, *ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to
    Large Language Models*, https://arxiv.org/abs/2605.19095
"""

import functools
import math
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sf_jax import _arguments, _averaging, _double, _meshes
from sf_jax._adamw import adamw_base
from sf_jax._averaging import one_minus_power
from sf_jax._decay import Mask
from sf_jax._double import Double, double, scalar_dtype
from sf_jax._schedule_free import (
    Iterates,
    StepSize,
    is_lean,
    may_lose_x,
    rule,
    widen,
)


class PolyakState(NamedTuple):
    """What the step size remembers."""

    grad_l1: jax.Array  # () scalar: e, the running mean of sqrt(π/2) Σ|g|


def polyak_step_size(
    learning_rate: optax.ScalarOrSchedule,
    sf_beta1: optax.ScalarOrSchedule,
    eps: jax.typing.ArrayLike,
    polyak_beta: jax.typing.ArrayLike,
    upstream_compatible: bool,
    axis_name: str | Sequence[str] | None = None,
    loss_floor: optax.ScalarOrSchedule = 0.0,
) -> StepSize:
    scheduled = _averaging.scheduled(learning_rate)
    axes = {axis_name} if isinstance(axis_name, str) else set(axis_name or ())
    is_checked = axis_name is None or bool(axes)

    def update(
        state: PolyakState,
        count: jax.Array,
        grads: optax.Updates,
        iterates: Iterates,
        extra_args: dict[str, Any],
    ) -> tuple[Double, PolyakState]:
        loss = extra_args.get("value")
        if loss is None:
            raise ValueError(
                "schedule_free_plus needs the loss: call update(grads, state, params, "
                "value=loss), with loss from jax.value_and_grad. Under other "
                "transformations use optax.chain, which hands value on."
            )
        loss = jnp.asarray(loss, scalar_dtype())
        if is_checked:
            _check_axes(axes, loss, grads, iterates)
        if spread := _meshes.varying(loss) & axes:
            loss = jax.lax.pmean(loss, tuple(spread))
        whole = _undone_clipping(grads, extra_args.get("grad_norm"), axes)
        norm = whole * _total(jax.tree.map(_sum_abs, grads), axes)
        norm = math.sqrt(math.pi / 2) * norm
        # Rounded to float32, polyak_beta and 1 - polyak_beta would not add up to 1.
        mean = state.grad_l1 + (1 - polyak_beta) * (norm - state.grad_l1)
        corrected = mean / one_minus_power(polyak_beta, count)
        beta = sf_beta1(count) if callable(sf_beta1) else sf_beta1
        floor = _arguments.at("loss_floor", loss_floor, count)
        gap = loss - floor - beta * whole * _inner(grads, iterates, axes)
        # Without a gradient there is no direction either, and any step will do. After a
        # loss that is not finite there is no step.
        some = (corrected > 0) & jnp.isfinite(gap)
        ratio = jnp.where(
            some, jnp.maximum(gap, 0) / jnp.where(some, corrected, 1), 0.0
        )
        lr, least = scheduled(count), double(eps)
        lr = _double.where(lr.hi >= least.hi, lr, least)
        kept = corrected if upstream_compatible else mean
        return _double.multiply(lr, double(ratio)), PolyakState(jnp.asarray(kept))

    return StepSize(lambda params: PolyakState(jnp.zeros((), scalar_dtype())), update)


def annealed(
    start: jax.typing.ArrayLike,
    end: jax.typing.ArrayLike,
    steps: jax.typing.ArrayLike,
) -> Callable[[jax.Array], jax.Array]:
    """β from start to end in so many steps, geometric in ``1 - β``; 0 for start."""

    def beta(count: jax.Array) -> jax.Array:
        # An injected number of steps may be 0.
        share = count.astype(scalar_dtype()) / jnp.maximum(steps, 1)
        s = jnp.where(jnp.asarray(steps) > 0, jnp.minimum(share, 1), 0)
        at_start = jnp.log(_averaging.complement(start))
        at_end = jnp.log(_averaging.complement(end))
        return -jnp.expm1((1 - s) * at_start + s * at_end)

    return beta


@_arguments.checked(b1=_arguments.DECAY_RATE)
def schedule_free_plus(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    sf_beta1: float = 0.9,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    r: float = 0.0,
    polyak_beta: float = 0.0,
    c_warmup: int = 0,
    sf_beta1_anneal_steps: int = 0,
    sf_beta1_max: float = 0.965,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    mask: Mask | None = None,
    store_x: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
    upstream_compatible: bool = False,
    axis_name: str | Sequence[str] | None = None,
    loss_floor: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""ScheduleFree+, AdamC with a Polyak step size, for large runs.

    .. math::

        e' &= p e + (1 - p) \sqrt{\pi / 2} \sum |g|, \qquad
              \hat e = e' / (1 - p^{k+1}) \\
        lr_k &= \max(lr, \epsilon) \,
                \max(0, f - f_{low} + \beta_k \sum g \cdot (z - x)) / \hat e \\
        z' &= z - lr_k \frac{\hat m}{\sqrt{\hat v} + \epsilon} - lr_k^2 \lambda y \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta_k) z' + \beta_k x'

    with f the loss, :math:`f_{low}` the ``loss_floor`` and p the ``polyak_beta``. The
    sums run over the whole tree; under ``jit`` over all devices of sharded arrays too,
    in ``shard_map`` over the axes in ``axis_name``. f is the mean loss of the whole
    batch, to which the gradients belong: with a loss of its own each replica would take
    a step of its own. A loss that is not finite gives a step of size 0.

    Gradients that were clipped make the sums too small and the step too long. Give
    ``update`` their norm before that too, ``grad_norm=optax.tree.norm(grads)``: the
    step size is then that of the whole gradients. This is for clipping by one factor,
    as in ``optax.chain(optax.clip_by_global_norm(1.0), schedule_free_plus())``; where
    elements are clipped each by itself, the ratio of the norms is not quite right.
    ``optax.MultiSteps`` hands on what the last of its batches was given: let that be
    the mean of their losses.

    Args:
      learning_rate: a factor on the step size, 1 unless you know better; a float, an
        array or a schedule of the count.
      b1: decay rate of the first moment m, in [0, 1). Not β, unlike elsewhere.
      b2: decay rate of the second moment v, in [0, 1).
      sf_beta1: β, the weight of x in y, in [0, 1].
      eps: added to the root of v, and the least ``learning_rate``.
      weight_decay: λ, times the square of the step size, at y. That makes good values
        far larger than AdamW's.
      r: steps are also weighed by ``(k + 1) ** r``.
      polyak_beta: decay rate of the mean of the gradients' size, in [0, 1); 0 for the
        present gradient alone.
      c_warmup: steps before the average begins; until then x is z.
      sf_beta1_anneal_steps: steps in which β goes to ``sf_beta1_max``; 0 for constant.
      sf_beta1_max: β after those steps.
      weight_lr_power: steps are weighed by the largest step size so far to this power.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      mask: which leaves decay: a prefix tree of bools or a function of params giving
        one; None for all.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      moment_dtype: dtype of the moments; None for that of each
        parameter, at least float32, whatever ``state_dtype`` is. In bfloat16 a slow
        mean stands still: what a step adds is rounded away.
      upstream_compatible: follow the published code also where it corrects its mean
        of the gradients' size for bias again and again, so that with
        ``polyak_beta > 0`` the step size vanishes.
      axis_name: the mesh axes of ``shard_map`` along which devices hold other parts of
        the parameters, or other losses: one name or several. Sums run over the parts,
        what is the same along an axis counts once, and the mean of the losses is
        taken. None for none; that is checked. Which values differ is known only with
        ``check_vma=True``. Without it, and in ``pmap``, only ``axis_name=()`` works,
        which checks nothing: each device must hold all parameters and be given the
        mean, ``value=jax.lax.pmean(loss, axis)``.
      loss_floor: f_low, the least loss that is thought possible, in the loss's unit: a
        finite number, an array or a schedule of the count (0 at the first step). 0
        suits a model that can come near a loss of 0; where it cannot, steps come out
        too long near the end. Too high a floor stops training once the loss is there:
        steps are 0 where ``f - f_low + I`` is not positive.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``. Its ``update``
      needs the loss too, ``update(grads, state, params, value=loss)``, and takes
      ``grad_norm``.

    Raises:
      ValueError: an argument out of its range; in ``update`` a missing ``value``, or
        parts of parameters, gradients or losses along axes not in ``axis_name``.
      TypeError: a number of steps that is not a whole number, or an ``axis_name`` that
        is no name.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_plus()
      >>> params = jnp.array([3.0, -2.0])  # y
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     loss, grads = jax.value_and_grad(lambda w: jnp.sum(w**2))(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(sf_jax.eval_params(state, params)) < 0.2)
      True

    References:
      Defazio, *ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to
        Large Language Models*, https://arxiv.org/abs/2605.19095
    """
    beta: Any = sf_beta1
    if not _arguments.is_off(sf_beta1_anneal_steps):
        # An average that is all of y could never be left again.
        _arguments.check("sf_beta1", sf_beta1, _arguments.DECAY_RATE)
        beta = annealed(sf_beta1, sf_beta1_max, sf_beta1_anneal_steps)
        store_x = store_x or may_lose_x(sf_beta1) or may_lose_x(sf_beta1_max)
    return rule(
        adamw_base(b2, eps, b1, weight_decay, "y", mask, moment_dtype, variant="adamc"),
        polyak_step_size(
            learning_rate,
            beta,
            eps,
            polyak_beta,
            upstream_compatible,
            axis_name,
            loss_floor,
        ),
        _averaging.mean_after(c_warmup, _averaging.polynomial_mean(r, weight_lr_power)),
        beta,
        state_dtype=state_dtype,
        store_x=store_x,
    )


def _check_axes(
    axes: Set[str], loss: jax.Array, grads: optax.Updates, iterates: Iterates
) -> None:
    """Refuses what is spread over devices, unless its axes are said and known."""
    if _meshes.is_unknown():
        raise ValueError(
            "schedule_free_plus is in pmap, or in shard_map with check_vma=False: "
            "nothing says which parameters and losses differ between devices. Leave "
            "check_vma at True; or, where each device holds all parameters, build the "
            "optimizer with axis_name=() and pass value=jax.lax.pmean(loss, axis)."
        )
    if unknown := axes - set(_meshes.manual_axes()):
        raise ValueError(
            f"axis_name holds {sorted(unknown)}, which no shard_map maps here. Call "
            "update inside of it; under jit alone leave axis_name out."
        )
    for g, z in zip(jax.tree.leaves(grads), jax.tree.leaves(iterates.z), strict=True):
        if local := _meshes.varying(g) - _meshes.varying(z):
            raise ValueError(
                f"gradients differ along the mesh axes {sorted(local)}, and parameters "
                "do not. Pass their mean, jax.lax.pmean(grads, axis)."
            )
    spread = _meshes.varying(loss).union(*map(_meshes.varying, jax.tree.leaves(grads)))
    if more := spread - axes:
        raise ValueError(
            "the gradients or the loss of schedule_free_plus differ along the mesh "
            f"axes {sorted(more)}, which are not in axis_name. Put them there, for "
            "sums over all parts and the mean of the losses."
        )


def _inner(grads: optax.Updates, iterates: Iterates, axes: Set[str]) -> jax.Array:
    """``Σ g·(x - z)``, with ``(y - z) / β`` for ``x - z`` where x is not stored.

    Neither z - x nor z - y: those move x and y later on, and XLA would keep them from
    here to there, an array a leaf.
    """

    def of_leaf(g: jax.Array, y: jax.Array, z: jax.Array, x: Any) -> jax.Array:
        lean = is_lean(x)
        way = widen(y if lean else x) - widen(z)
        total = _sum(jnp.real(jnp.conj(widen(g)) * way))
        # After the sum: before, XLA for CPUs would make an array of 1 / β.
        return total / iterates.b1 if lean else total

    return _total(
        jax.tree.map(of_leaf, grads, iterates.y, iterates.z, iterates.stored_x), axes
    )


def _undone_clipping(
    grads: optax.Updates, grad_norm: jax.typing.ArrayLike | None, axes: Set[str]
) -> jax.Array | float:
    """What undoes the factor that the gradients were multiplied by to clip them."""
    if grad_norm is None:
        return 1.0
    present = jnp.sqrt(_total(jax.tree.map(_sum_squares, grads), axes))
    some = present > 0
    return jnp.where(some, grad_norm / jnp.where(some, present, 1), 1.0)


def _sum_squares(leaf: jax.Array) -> jax.Array:
    return _sum(jnp.square(jnp.abs(widen(leaf))))


def _sum_abs(leaf: jax.Array) -> jax.Array:
    return _sum(jnp.abs(leaf))


def _sum(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf, dtype=scalar_dtype())


def _total(sums: optax.Updates, axes: Set[str]) -> jax.Array:
    """Of a tree of numbers, one a leaf or its parts along these axes; 0 if empty."""
    # One sum for all leaves that are spread alike: each is a talk between devices.
    totals: dict[frozenset[str], jax.Array] = {}
    zero = jnp.zeros((), scalar_dtype())
    for one in jax.tree.leaves(sums):
        spread = _meshes.varying(one) & axes
        totals[spread] = totals.get(spread, zero) + one
    return functools.reduce(
        jnp.add,
        (jax.lax.psum(t, tuple(axes)) if axes else t for axes, t in totals.items()),
        zero,
    )
