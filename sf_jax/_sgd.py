r"""Schedule-Free SGD.

.. math::

    z' = z - lr_k (g + \lambda p)

with p one of y, z and x. β takes the place of momentum.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from typing import Any

import jax
import optax

from sf_jax import _averaging
from sf_jax._arguments import checked
from sf_jax._averaging import Average
from sf_jax._decay import Mask, add_decay
from sf_jax._rounding import rounding_of
from sf_jax._schedule_free import (
    Base,
    Iterates,
    downhill,
    of_count,
    rule,
    widen,
)


def sgd_base(
    weight_decay: jax.typing.ArrayLike | None, decay_at: str, mask: Mask | None
) -> Base:
    def update(
        grads: optax.Updates,
        state: optax.OptState,
        iterates: Iterates,
        count: jax.Array,
        lr: jax.Array,
        extra_args: dict[str, Any],
    ) -> tuple[optax.Updates, optax.OptState]:
        direction = add_decay(
            jax.tree.map(widen, grads), iterates, weight_decay, decay_at, mask
        )
        return downhill(direction, lr), state

    return Base(lambda z: optax.EmptyState(), update)


@checked()
def schedule_free_sgd(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    warmup_steps: int | None = None,
    b1: optax.ScalarOrSchedule = 0.9,
    weight_decay: float | None = None,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float = 0.0,
    decay_at: str = "y",
    mask: Mask | None = None,
    average: Average | None = None,
    store_x: bool = False,
    rounding: str = "nearest",
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-Free SGD.

    .. math::

        lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
        z' &= z - lr_k (g + \lambda p) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    Args:
      learning_rate: step size; a float, an array or a schedule of the count. Good
        values are 10 to 50 times those of SGD with a schedule.
      warmup_steps: steps of linear warmup; None or 0 for none.
      b1: β, the weight of x in y, in [0, 1]; a float, an array or a schedule. It
        takes the place of momentum. A schedule that reaches 0 needs ``store_x=True``.
      weight_decay: λ, decoupled and times the learning rate; None or 0 for none.
      weight_lr_power: steps are weighed by the largest learning rate so far to this
        power; 2 keeps warmup out of the average.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      r: steps are also weighed by ``(k + 1) ** r``.
      decay_at: "y", "z" or "x": what the decay pulls towards zero by.
      mask: which leaves decay: a prefix tree of bools or a function of params giving
        one; None for all.
      average: another averaging weight: :func:`~sf_jax.refined_average`,
        :func:`~sf_jax.exponential_average`, or your own, as :func:`schedule_free` has
        it; None for the weighted mean.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=jnp.bfloat16``: y (of bfloat16 params), z and x. Rounded at
        random, small steps are not lost. The random bits depend on ``seed``, the count
        and the place of an element alone; within ``shard_map`` that is its place in
        the shard.
      seed: from 0 to 2^32 - 1, of the random bits. The state does not hold it: a run
        that goes on needs the same one for the same bits.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``; its updates have
      the params' structure and dtypes.

    Raises:
      ValueError: b1 outside [0, 1], a negative learning rate, weight decay or number
        of steps, an unknown ``decay_at`` or ``rounding``, a seed out of range, or
        ``rounding="stochastic"`` with another ``state_dtype`` than bfloat16.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_sgd(0.5, warmup_steps=10)
      >>> params = jnp.array([3.0, -2.0])  # y
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     grads = 2 * params  # of |y|^2
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(jnp.linalg.norm(sf_jax.eval_params(state, params)) < 0.2)
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    _averaging.check_average(average, r, weight_lr_power)
    return rule(
        sgd_base(weight_decay, decay_at, mask),
        of_count(_averaging.scheduled(learning_rate, warmup_steps)),
        _averaging.polynomial_mean(r, weight_lr_power),
        b1,
        average=average,
        state_dtype=state_dtype,
        store_x=store_x,
        rounding=rounding_of(rounding, seed, state_dtype),
    )
