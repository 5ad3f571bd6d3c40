r"""Prodigy with Schedule-Free averaging: neither a schedule nor a learning rate.

Prodigy moves z and estimates d, the distance to the solution, which multiplies the
learning rate of the next step. The average weighs each step by :math:`lr_k d`, with
the d after the step. Prodigy measures how far z has come, so z is its params.

References:
  Mishchenko and Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free Learner*,
    https://arxiv.org/abs/2306.06101
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sf_jax import _averaging, _checks, _meshes
from sf_jax._adamw import positive_eps
from sf_jax._moments import with_moment_dtype
from sf_jax._schedule_free import schedule_free


def schedule_free_prodigy(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    warmup_steps: int | None = None,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float = 0.0,
    inner_momentum: float = 0.0,
    estim_lr0: float = 1e-6,
    estim_lr_coef: float = 1.0,
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
      weight_decay: decoupled, times the step size, at z.
      weight_lr_power: steps are weighed by the largest step size so far to this power.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      r: steps are also weighed by ``(k + 1) ** r``.
      inner_momentum: Prodigy's own first moment, in [0, 1); β takes its place.
      estim_lr0: the first d, smaller than the distance to the solution.
      estim_lr_coef: a factor on the estimates of d.
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
      ValueError: an argument out of its range; in ``update`` parameters that are, or
        may be, parts of sharded ones, without ``per_device``.
      TypeError: ``warmup_steps`` that is not a whole number.

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
    _checks.learning_rate(learning_rate)
    _checks.warmup_steps(warmup_steps)
    _checks.decay_rate("b2", b2)
    _checks.decay_rate("inner_momentum", inner_momentum)
    _checks.eps(eps)
    _checks.weight_decay(weight_decay)
    _checks.floating_dtype("moment_dtype", moment_dtype)
    lr = _averaging.schedule(_averaging.scheduled(learning_rate, warmup_steps))
    prodigy = optax.contrib.prodigy(
        lr,
        betas=(inner_momentum, b2),
        eps=positive_eps(eps),
        estim_lr0=estim_lr0,
        estim_lr_coef=estim_lr_coef,
        weight_decay=weight_decay,
    )
    prodigy = _meshes.whole(
        _from_the_first_gradient(prodigy),
        per_device,
        jax.tree.leaves,
        "Prodigy would sum over each device's part of the parameters by itself",
    )
    return schedule_free(
        with_moment_dtype(prodigy, moment_dtype),
        lr,
        b1,
        weight_lr_power,
        state_dtype,
        r=r,
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
