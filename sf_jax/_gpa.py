r"""Generalized Primal Averaging (GPA) over AdamW: an exponential average of z.

.. math::

    z' &= (1 - lr_k \lambda) z - lr_k \frac{\hat m}{\sqrt{\hat v} + \epsilon} \\
    x' &= \mu_x x + (1 - \mu_x) z' \\
    y' &= \mu_y x' + (1 - \mu_y) z'

It is the rule with :math:`c = 1 - \mu_x` and :math:`\beta = \mu_y`. With the μ_x of
a plain mean, ``1 - 1 / (k + 1)``, it is Schedule-Free AdamW with momentum.

The published code shrinks z and leaves y where it is. Since x is what y and z imply,
that pushes x away from zero by :math:`lr_k \lambda z (1 - \mu_y) / \mu_y`;
``upstream_compatible`` does the same.

References:
  Defazio et al., *Smoothing DiLoCo with Primal Averaging for Faster Training of
    LLMs*, https://arxiv.org/abs/2512.17131
  https://github.com/facebookresearch/optimizers (gpa, the published code)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sf_jax import _arguments, _averaging
from sf_jax._adamw import schedule_free_adamw
from sf_jax._decay import Mask, decaying
from sf_jax._schedule_free import ScheduleFreeState, is_lean, like, per_leaf, widen


@_arguments.checked(b1=_arguments.DECAY_RATE)
def gpa_adamw(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    warmup_steps: int | None = None,
    mu_y: optax.ScalarOrSchedule = 0.7,
    mu_x: optax.ScalarOrSchedule = 0.9967,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    decay_at: str = "z",
    mask: Mask | None = None,
    store_x: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
    upstream_compatible: bool = False,
    rounding: str = "nearest",
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with Generalized Primal Averaging.

    .. math::

        z' &= (1 - lr_k \lambda) z - lr_k \frac{\hat m}{\sqrt{\hat v} + \epsilon} \\
        x' &= \mu_x x + (1 - \mu_x) z' \\
        y' &= \mu_y x' + (1 - \mu_y) z'

    Args:
      learning_rate: step size; a float, an array or a schedule of the count. Unlike
        Schedule-Free's, it may well decay.
      warmup_steps: steps of linear warmup; None or 0 for none.
      mu_y: weight of x in y, in [0, 1]; a float, an array or a schedule.
      mu_x: weight of the old x in the new, in [0, 1]; a float, an array or a schedule.
      b1: decay rate of the first moment m, in [0, 1).
      b2: decay rate of the second moment v, in [0, 1).
      eps: added to the root of v.
      weight_decay: λ, decoupled and times the learning rate.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      decay_at: "z", "y" or "x": what the decay pulls towards zero by.
      mask: which leaves decay: a prefix tree of bools or a function of params giving
        one; None for all.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      moment_dtype: dtype of the moments; None for that of each
        parameter, at least float32, whatever ``state_dtype`` is. In bfloat16 a slow
        mean stands still: what a step adds is rounded away.
      upstream_compatible: decay as the published code does, which moves x too (see
        the module).
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=jnp.bfloat16``, and ``seed``: as in
        :func:`~sf_jax.schedule_free_adamw`.
      seed: from 0 to 2^32 - 1, of the random bits.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``.

    Raises:
      ValueError: an argument out of its range, an unknown ``decay_at``, or
        ``rounding="stochastic"`` with another ``state_dtype`` than bfloat16 or with
        ``upstream_compatible``.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.gpa_adamw(0.1, mu_x=0.9)
      >>> params = jnp.array([3.0, -2.0])  # y
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...     updates, state = tx.update(2 * params, state, params)  # of |y|^2
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(sf_jax.eval_params(state, params)) < 0.2)
      True

    References:
      Defazio et al., *Smoothing DiLoCo with Primal Averaging for Faster Training of
        LLMs*, https://arxiv.org/abs/2512.17131
    """
    if upstream_compatible and rounding == "stochastic":
        raise ValueError(
            'upstream_compatible does not go with rounding="stochastic": its decay '
            "rounds to nearest, and is lost. Leave upstream_compatible out."
        )
    tx = schedule_free_adamw(
        learning_rate,
        warmup_steps,
        mu_y,
        b2,
        eps,
        0.0 if upstream_compatible else weight_decay,
        state_dtype=state_dtype,
        inner_momentum=b1,
        decay_at=decay_at,
        mask=mask,
        average=_averaging.exponential_average(mu_x),
        store_x=store_x,
        moment_dtype=moment_dtype,
        rounding=rounding,
        seed=seed,
    )
    if not upstream_compatible or _arguments.is_off(weight_decay):
        return tx
    if decay_at == "x":
        raise ValueError(
            "upstream_compatible needs decay_at 'z' or 'y', got 'x': its decay moves x "
            "through y and z. Leave upstream_compatible out."
        )
    if _arguments.is_off(mu_y):
        raise ValueError(
            f"upstream_compatible needs mu_y > 0, got {mu_y}: with y = z there is no x "
            "for the decay to move. Leave upstream_compatible out."
        )
    step_size = _averaging.scheduled(learning_rate, warmup_steps)

    def update(
        grads: optax.Updates,
        state: ScheduleFreeState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScheduleFreeState]:
        if params is None:
            return tx.update(grads, state)  # which says what is missing
        shrink = step_size(state.count).hi * weight_decay
        held, moved = _shrunk(decay_at, shrink, state, params, mask)
        updates, state = tx.update(grads, held, moved, **extra_args)
        return jax.tree.map(lambda u, m, p: u + (m - p), updates, moved, params), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _shrunk(
    at: str,
    shrink: jax.Array,
    state: ScheduleFreeState,
    params: optax.Params,
    mask: Mask | None,
) -> tuple[ScheduleFreeState, optax.Params]:
    """Shrinks z or y by the decay, keeps the other, and sets x to what both imply."""
    decays = decaying(mask, params)

    def smaller(leaf: jax.Array, decay: bool) -> jax.Array:
        wide = widen(leaf)
        return (wide - like(shrink, wide) * wide).astype(leaf.dtype) if decay else leaf

    def implied(x: Any, z: jax.Array, decay: bool) -> Any:
        if is_lean(x) or not decay:
            return x
        x, z, b1 = widen(x), widen(z), like(state.b1, x)
        away = (1 - b1) * z if at == "z" else -(b1 * x + (1 - b1) * z)
        moved = x + like(shrink, x) / jnp.where(b1 > 0, b1, 1) * away
        # An array may hold 0; then y is z, and says nothing of x.
        return jnp.where(b1 > 0, moved, x).astype(z.dtype)

    stored_x = per_leaf(state.x, state.z)
    x = jax.tree.map(lambda z, x, d: implied(x, z, d), state.z, stored_x, decays)
    x = state.x if is_lean(state.x) else x
    if at == "z":
        z = jax.tree.map(smaller, state.z, decays)
        return state._replace(z=z, x=x), params
    y = jax.tree.map(
        # A stored x carries y along; the parameter itself counts where it does not.
        lambda p, x, d: smaller(p, d) if is_lean(x) else p,
        params,
        stored_x,
        decays,
    )
    return state._replace(x=x), y
