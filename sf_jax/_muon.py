r"""Muon with Schedule-Free averaging; parameters that are not matrices under AdamW.

.. math::

    z' = z - lr_k (O(m) + \lambda p)

with O(m) the momentum m of the gradients at y, orthogonalised, as
``optax.contrib.muon`` does it; or with its rows normalised, see :mod:`sf_jax._normuon`.
Everything else is the rule's.

References:
  Jordan et al., *Muon: An optimizer for hidden layers in neural networks*,
    https://kellerjordan.github.io/posts/muon
  Kim et al., *AMUSE: Anytime Muon with Stable Gradient Evaluation*,
    https://arxiv.org/abs/2605.22432 (the growing β), and the authors' code,
    https://github.com/kjeiun/amuse, ``src/optim/AMUSE.py``
  Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
    https://arxiv.org/abs/2605.23061 (decay at z, the rows)
  Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sf_jax import _arguments, _averaging, _meshes
from sf_jax._adamw import positive_eps
from sf_jax._decay import decaying
from sf_jax._moments import with_moment_dtype
from sf_jax._normuon import dimension_numbers, matrices, normuon
from sf_jax._schedule_free import ByWeight, over


@_arguments.checked(b1=_arguments.INTERPOLATION)
def growing_b1(b1: float = 0.9, steps: int = 1000, rho: float = 0.5) -> optax.Schedule:
    r"""A β that grows towards 1: gradients near z at first, near x later on.

    .. math::

        1 - \beta_t = (1 - \beta_1) \left( \frac{T_0 - 1}{t - 1} \right)^\rho
        \quad\text{after } T_0 \text{ steps}

    with t = 1 at the first gradient. For the ``b1`` of any optimizer here.

    It is Eq. 1 of the paper. The authors' code computes β from the averaging weight,
    see :func:`schedule_free_muon`; without warmup the two are the same.

    Args:
      b1: β for the first ``steps`` steps, in [0, 1].
      steps: T_0, at least 2.
      rho: how fast β grows; 0 for a constant.

    Returns:
      A schedule of the count.

    Raises:
      ValueError: an argument out of its range.

    Examples:
      >>> import sf_jax
      >>> b1 = sf_jax.growing_b1(0.9, steps=101, rho=1.0)
      >>> [round(float(b1(count)), 3) for count in (0, 99, 199, 999)]
      [0.9, 0.9, 0.95, 0.99]

    References:
      Kim et al., *AMUSE: Anytime Muon with Stable Gradient Evaluation*,
        https://arxiv.org/abs/2605.22432
    """

    return _Growing(b1, steps, rho)


@dataclasses.dataclass(frozen=True)
class _Growing:
    b1: float
    steps: int
    rho: float

    def __call__(self, count: jax.typing.ArrayLike) -> jax.Array:
        # The y that step k forms is where gradient t = k + 2 is taken.
        ratio = (self.steps - 1) / _averaging.steps_taken(count)
        return self._grown(jnp.minimum(ratio, 1))

    def _grown(self, ratio: jax.Array) -> jax.Array:
        return 1 - _averaging.complement(self.b1) * ratio**self.rho

    def as_published(self, power: jax.typing.ArrayLike) -> ByWeight:
        """β from c_t, where steps are weighed by (t lr_t / lr)^power in the warmup."""
        t = np.arange(1, self.steps) / self.steps

        def beta(count: jax.Array, ckp1: jax.Array) -> jax.Array:
            warm = _averaging.steps_taken(count) > self.steps
            c = jnp.where(warm, ckp1, 0.5)
            # (1 - c) / c at the end of warmup: the weights before it over the last.
            before = (t**power).sum()
            return jnp.where(warm, self._grown(c / (1 - c) * before), self.b1)

        return ByWeight(self.b1, beta)


@_arguments.checked(weight_decay=_arguments.MAGNITUDE)
def schedule_free_muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    warmup_steps: int | None = None,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_lr_power: float = 2.0,
    state_dtype: jax.typing.DTypeLike | None = None,
    *,
    r: float = 0.0,
    momentum: float = 0.95,
    row_b2: float | None = None,
    decay_at: str = "z",
    average: _averaging.Average | None = None,
    store_x: bool = False,
    moment_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = True,
    consistent_rms: float | None = None,
    muon_weight_dimension_numbers: Any = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    ns_coeffs: Any = None,
    ns_steps: int | None = None,
    adaptive: bool = False,
    preconditioning: str | None = None,
    per_device: bool = False,
    upstream_compatible: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-Free Muon, over ``optax.contrib.muon``.

    .. math::

        z' &= z - lr_k (O(m) + \lambda p) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    Args:
      learning_rate: step size of matrices and, unless ``adam_learning_rate`` is given,
        of the rest; a float, an array or a schedule of the count.
      warmup_steps: steps of linear warmup; None or 0 for none.
      b1: β, the weight of x in y, in [0, 1]; a float, an array or a schedule such as
        :func:`growing_b1`.
      b2: decay rate of the second moment of what is not a matrix, in [0, 1).
      eps: added to the root of it.
      weight_decay: λ, decoupled and times the learning rate, for all leaves.
      weight_lr_power: steps are weighed by the largest learning rate so far to this
        power.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      r: steps are also weighed by ``(k + 1) ** r``.
      momentum: Muon's own, in [0, 1).
      row_b2: decay rate of the second moment of rows, in [0, 1), for NorMuon; None for
        Muon.
      decay_at: "z", "y" or "x": what the decay pulls towards zero by. At y it has been
        found to let z drift in long runs.
      average: another averaging weight, as :func:`schedule_free` has it; None for the
        weighted mean.
      store_x: keep x in the state, so that ``eval_params`` needs no params.
      moment_dtype: dtype of the moments; None for that of each
        parameter, at least float32, whatever ``state_dtype`` is. In bfloat16 a slow
        mean stands still: what a step adds is rounded away.
      nesterov: whether Muon's momentum looks ahead.
      consistent_rms: the root mean square of a matrix's step over its learning rate,
        0.2 for steps of AdamW's size; None for steps scaled by the matrix's shape, or
        with ``row_b2`` for 0.2.
      muon_weight_dimension_numbers: which leaves are matrices, and how, as
        ``optax.contrib.muon`` takes it; None for all leaves of two axes.
      adam_learning_rate: step size of what is not a matrix; a float, an array or a
        schedule of the count. None for ``learning_rate`` with its warmup.
      weight_decay_mask: which matrices decay: a prefix tree of bools or a function of
        params giving one; None for all.
      ns_coeffs: of the Newton-Schulz iteration; None for optax's.
      ns_steps: how many of its steps; None for optax's 5.
      adaptive: whether steps are scaled by the dual norm of the gradient.
      preconditioning: how the momentum is scaled before Newton-Schulz, a name that
        ``optax.contrib.muon`` knows; None for its own choice.
      per_device: whether, inside ``shard_map`` or ``pmap``, each device holds whole
        matrices (replicas, experts, one model a device). A part of a matrix must not
        be orthogonalised by itself, and is refused there without it. Under ``jit`` it
        changes nothing: there matrices may be sharded as you like.
      upstream_compatible: β and x as in the published code of AMUSE, for
        ``b1=growing_b1(b1, steps, rho)`` with ``warmup_steps=steps`` and a constant
        learning rate. β follows from the averaging weight c of the step,

        .. math::

            1 - \beta_t = (1 - \beta_1) \left( \frac{c_t}{1 - c_t}
                \frac{1 - c_{T_0}}{c_{T_0}} \right)^\rho

        which grows sooner than Eq. 1: warmup weighs little. And x is recovered from y
        with this new β, although the former formed y, so that it comes nearer to z.

    Returns:
      An optax transformation whose state is a ``ScheduleFreeState``.

    Raises:
      ValueError: an argument out of its range; in ``update`` matrices that are, or may
        be, parts of sharded ones, without ``per_device``.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_muon(0.1)
      >>> params = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}  # y
      >>> state = tx.init(params)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(100):
      ...     updates, state = update(params, state, params)  # of |y|^2 / 2
      ...     params = optax.apply_updates(params, updates)
      >>> bool(optax.tree.norm(sf_jax.eval_params(state, params)) < 0.5)
      True

    References:
      Kim et al., *AMUSE*, https://arxiv.org/abs/2605.22432
      Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
        https://arxiv.org/abs/2605.23061
    """
    beta: Any = b1
    if upstream_compatible:
        _check_published(learning_rate, warmup_steps, b1)
        beta = beta.as_published(r + weight_lr_power)
    lr = _averaging.schedule(_averaging.scheduled(learning_rate, warmup_steps))
    # As functions: optax would call a tree that is callable as a whole.
    numbers, mask = muon_weight_dimension_numbers, weight_decay_mask
    if numbers is not None:
        numbers = functools.partial(dimension_numbers, numbers)
    if mask is not None:
        mask = functools.partial(decaying, mask, name="weight_decay_mask")
    options = {
        "nesterov": nesterov,
        "consistent_rms": consistent_rms,
        "muon_weight_dimension_numbers": numbers,
        "adam_learning_rate": adam_learning_rate,
        "weight_decay_mask": mask,
        "ns_coeffs": ns_coeffs,
        "ns_steps": ns_steps,
        "adaptive": adaptive,
        "preconditioning": preconditioning,
    }
    options = {name: value for name, value in options.items() if value is not None}

    least = positive_eps(eps)
    if row_b2 is None:
        muon = optax.contrib.muon(
            lr,
            beta=momentum,
            eps=least,
            weight_decay=weight_decay,
            adam_b1=0.0,  # β takes its place
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            **options,
        )
    else:
        muon = normuon(lr, row_b2, momentum, b2, least, weight_decay, **options)
    muon = _meshes.whole(
        muon,
        per_device,
        lambda params: matrices(numbers, params),
        "Muon would orthogonalise each part of a sharded matrix by itself",
    )
    return over(
        with_moment_dtype(muon, moment_dtype),
        lr,
        beta,
        weight_lr_power,
        state_dtype,
        r=r,
        average=average,
        decay_at=decay_at,
        store_x=store_x,
    )


def _check_published(learning_rate: Any, warmup_steps: Any, b1: Any) -> None:
    if not isinstance(b1, _Growing) or _arguments.is_off(b1.b1):
        raise ValueError(
            "upstream_compatible=True needs a β that grows from above 0, got b1 = "
            f"{b1}. Pass b1=growing_b1(0.6, steps=6000, rho=0.8)."
        )
    if callable(learning_rate) or warmup_steps != b1.steps:
        raise ValueError(
            f"upstream_compatible needs the warmup that β waits for, and a constant "
            f"learning rate: got warmup_steps={warmup_steps} and {learning_rate}. Pass "
            f"a number and warmup_steps={b1.steps}."
        )
