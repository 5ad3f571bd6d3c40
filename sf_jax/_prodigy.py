r"""Prodigy with Schedule-Free averaging: neither a schedule nor a learning rate.

Prodigy moves z and estimates d, the distance to the solution, which multiplies the
learning rate of the next step. The average weighs each step by :math:`lr_k d`, with
the d after the step. Prodigy measures how far z has come, so z is its params.

The variant "algoperf" is the combination that Meta entered into AlgoPerf. It corrects
no bias, decays at x, steps with the d that the step found, and weighs by the number of
the step alone:

.. math::

    v' &= b_2 v + (1 - b_2) (d g)^2 \\
    n' &= b_3 n + d^2 lr_k \sum g \cdot (z_0 - z), \qquad
    s' = b_3 s + d^2 lr_k g \\
    d' &= \max(d, n' / \sum |s'|) \\
    z' &= z - d \, lr_k \left( \frac{d' g}{\sqrt{v'} + d' \epsilon} + \lambda x \right),
    \qquad w_k = (k+1)^{0.75}

References:
  Mishchenko and Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free Learner*,
    https://arxiv.org/abs/2306.06101
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  facebookresearch/schedule_free, ``schedulefree/algoperf/external_tuning/``
    ``schedule_free_prodigy/submission.py`` (the variant)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sf_jax import _arguments, _averaging, _meshes
from sf_jax._adamw import positive_eps, root
from sf_jax._double import scalar_dtype
from sf_jax._moments import with_moment_dtype
from sf_jax._schedule_free import (
    Base,
    Iterates,
    beside_z,
    like,
    of_count,
    over,
    rule,
    widen,
)


@_arguments.checked(
    weight_decay=_arguments.MAGNITUDE,
    inner_momentum=_arguments.DECAY_RATE,
    r=_arguments.POWER_OR_NONE,
    weight_lr_power=_arguments.POWER_OR_NONE,
    variant=_arguments.PRODIGY_VARIANT,
)
def schedule_free_prodigy(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    warmup_steps: int | None = None,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float | None = None,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float | None = None,
    inner_momentum: float = 0.0,
    estim_lr0: float = 1e-6,
    estim_lr_coef: float = 1.0,
    beta3: float | None = None,
    safeguard_warmup: bool = False,
    variant: str = "standard",
    average: _averaging.Average | None = None,
    store_x: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
    per_device: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-Free Prodigy, over ``optax.contrib.prodigy``.

    .. math::

        z' &= z + u_{Prodigy}(g, z) \\
        w_k &= (k+1)^r \max_{i \le k} (lr_i d_{i+1})^2

    Args:
      learning_rate: a factor on Prodigy's own step size, 1 unless you know better; a
        float, an array or a schedule of the count.
      warmup_steps: steps of linear warmup; None or 0 for none.
      b1: β, the weight of x in y, in [0, 1]; a float, an array or a schedule.
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of it.
      weight_decay: decoupled, times the step size, at z; in the variant at x.
      weight_lr_power: steps are weighed by the largest step size so far to this power;
        None for 2, in the variant for 0.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      r: steps are also weighed by ``(k + 1) ** r``; None for 0, in the variant 0.75.
      inner_momentum: Prodigy's own first moment, in [0, 1); β takes its place. The
        variant has none.
      estim_lr0: the first d, smaller than the distance to the solution.
      estim_lr_coef: a factor on the estimates of d.
      beta3: decay rate of the sums that estimate d, in [0, 1); None for the root of b2.
      safeguard_warmup: whether warmup is kept out of the denominator of that estimate,
        so that small first steps do not make d too large; not in the variant.
      variant: "standard", or "algoperf" for Meta's entry, which had b2 = 0.9955, and
        its second moment and sums in bfloat16. Here they are kept in full.
      average: another averaging weight, as :func:`schedule_free` has it; None for the
        weighted mean.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      moment_dtype: dtype of the first and second moment; None for that of each
        parameter, at least float32, whatever ``state_dtype`` is. In bfloat16 a slow
        mean stands still: what a step adds is rounded away.
      per_device: whether, inside ``shard_map`` or ``pmap``, each device holds all
        parameters (replicas, one model a device). Sums over a part of them give no d,
        and are refused there without it. Under ``jit`` it changes nothing: there
        parameters may be sharded as you like.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``.

    Raises:
      ValueError: an argument out of its range, or one that the variant does not have;
        in ``update`` parameters that are, or may be, parts of sharded ones, without
        ``per_device``.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_prodigy()
      >>> params = jnp.array([3.0, -2.0])  # y
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(200):
      ...     updates, state = update(2 * params, state, params)  # of |y|^2
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(sf_jax.eval_params(state, params)) < 0.2)
      True

    References:
      Mishchenko and Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free
        Learner*, https://arxiv.org/abs/2306.06101
    """
    step_size = _averaging.scheduled(learning_rate, warmup_steps)
    if variant == "algoperf":
        if safeguard_warmup or not _arguments.is_off(inner_momentum):
            raise ValueError(
                f"safeguard_warmup={safeguard_warmup} and inner_momentum="
                f"{inner_momentum} have no place in variant='algoperf', which was "
                "published without either. Leave them out."
            )
        r = 0.75 if r is None else r
        weight_lr_power = 0.0 if weight_lr_power is None else weight_lr_power
        _averaging.check_average(average, r, weight_lr_power)
        b3 = b2**0.5 if beta3 is None else beta3
        return rule(
            _algoperf_base(
                b2,
                b3,
                eps,
                weight_decay,
                estim_lr0,
                estim_lr_coef,
                moment_dtype,
                per_device,
            ),
            of_count(step_size),
            _averaging.polynomial_mean(r, weight_lr_power),
            b1,
            average=average,
            state_dtype=state_dtype,
            store_x=store_x,
        )
    lr = _averaging.schedule(step_size)
    prodigy = optax.contrib.prodigy(
        lr,
        betas=(inner_momentum, b2),
        beta3=beta3,
        eps=positive_eps(eps),
        estim_lr0=estim_lr0,
        estim_lr_coef=estim_lr_coef,
        weight_decay=weight_decay,
        safeguard_warmup=safeguard_warmup,
    )
    prodigy = _whole(_from_the_first_gradient(prodigy), per_device)
    return over(
        with_moment_dtype(prodigy, moment_dtype),
        lr,
        b1,
        2.0 if weight_lr_power is None else weight_lr_power,
        state_dtype,
        r=0.0 if r is None else r,
        average=average,
        decay_at="z",
        lr_scale=lambda state: state.estim_lr,
        store_x=store_x,
    )


def _from_the_first_gradient(
    prodigy: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Prodigy that waits: while all gradients were 0, its estimate of d is 0 / 0."""

    def update(
        grads: optax.Updates, before: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        updates, after = prodigy.update(grads, before, params)
        seen = optax.tree.sum(jax.tree.map(jnp.abs, after.grad_sum)) > 0
        d = jnp.where(seen, after.estim_lr, before.estim_lr)
        updates = jax.tree.map(lambda u: jnp.where(seen, u, 0), updates)
        return updates, after._replace(estim_lr=d)

    return optax.GradientTransformation(prodigy.init, update)


def _whole(
    prodigy: optax.GradientTransformation, per_device: bool
) -> optax.GradientTransformationExtraArgs:
    return _meshes.whole(
        prodigy,
        per_device,
        jax.tree.leaves,
        "Prodigy would sum over each device's part of the parameters by itself",
    )


class AlgoPerfState(NamedTuple):
    """What the variant remembers; names as in optax's Prodigy."""

    exp_avg_sq: optax.Updates  # like z: v, of d g
    grad_sum: optax.Updates  # like z: s
    params0: optax.Params  # like z: z before the first step
    estim_lr: jax.Array  # () d
    numerator_weighted: jax.Array  # () n, of the estimate of d


def _algoperf_base(
    b2: float,
    b3: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    weight_decay: float,
    estim_lr0: float,
    estim_lr_coef: float,
    moment_dtype: jax.typing.DTypeLike | None,
    per_device: bool,
) -> Base:
    def init(z: optax.Params) -> AlgoPerfState:
        scalar = scalar_dtype()
        return AlgoPerfState(
            exp_avg_sq=optax.tree.zeros_like(z),
            grad_sum=optax.tree.zeros_like(z),
            params0=jax.tree.map(jnp.copy, z),
            estim_lr=jnp.array(estim_lr0, scalar),
            numerator_weighted=jnp.zeros((), scalar),
        )

    def update(
        grads: optax.Updates,
        state: AlgoPerfState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AlgoPerfState]:
        assert params is not None
        z, x, lr = params
        d, grads = state.estim_lr, jax.tree.map(widen, grads)
        # In units of d0, as Prodigy has its sums: d² alone would leave float32.
        share = d / estim_lr0 * d * lr
        way = jax.tree.map(jnp.subtract, state.params0, z)
        numerator = b3 * state.numerator_weighted + share * optax.tree.vdot(grads, way)
        v = jax.tree.map(
            lambda v, g: v + (1 - b2) * ((like(d, g) * g) ** 2 - v),
            state.exp_avg_sq,
            grads,
        )
        s = jax.tree.map(
            lambda s, g: b3 * s + like(share, g) * g, state.grad_sum, grads
        )
        total = optax.tree.sum(jax.tree.map(jnp.abs, s))
        seen = total > 0  # while all gradients were 0, nothing is known of d
        estimate = estim_lr_coef * numerator / jnp.where(seen, total, 1)
        next_d = jnp.where(seen, jnp.maximum(d, estimate), d)
        least = positive_eps(eps)

        def displacement(g: jax.Array, v: jax.Array, x: Any = None) -> jax.Array:
            by = like(next_d, g)
            way = by * g / (root(v) + by * least)
            if x is not None:
                way = way + weight_decay * x
            return jnp.where(seen, like(-d * lr, g) * way, 0)

        trees = (grads, v) if x is None else (grads, v, x)
        u = jax.tree.map(displacement, *trees)
        return u, AlgoPerfState(v, s, state.params0, next_d, numerator)

    transformation = with_moment_dtype(
        _whole(optax.GradientTransformationExtraArgs(init, update), per_device),
        moment_dtype,
    )

    move = _meshes.auto(transformation.update)

    def base_update(
        grads: optax.Updates,
        state: AlgoPerfState,
        iterates: Iterates,
        count: jax.Array,
        lr: jax.Array,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, optax.OptState]:
        at_z = jax.tree.map(widen, iterates.z)
        at_x = None
        if not _arguments.is_off(weight_decay):
            at_x = jax.tree.map(widen, iterates.x)
        return move(grads, state, (at_z, at_x, lr))

    init_beside_z = beside_z(transformation.init)
    return Base(init_beside_z, base_update, lambda state: state.estim_lr)
