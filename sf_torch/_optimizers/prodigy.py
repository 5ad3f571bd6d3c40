"""Schedule-Free Prodigy: neither a schedule nor a learning rate.

Prodigy moves z and estimates d, the distance to the solution, which multiplies the
learning rate. The average weighs each step by lr_k d, with the d that the step found.

References:
  Mishchenko and Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free Learner*,
    https://arxiv.org/abs/2306.06101
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import torch
from torch.optim.optimizer import ParamsT

from sf_torch import _checks
from sf_torch._optimizers.wrapper import ScheduleFreeWrapper
from sf_torch._step.numbers import EPS_FLOOR


class ProdigyScheduleFree(ScheduleFreeWrapper):
    r"""Schedule-Free Prodigy, over ``prodigyopt.Prodigy``.

    .. math::

        z' &= z + u_{Prodigy}(g, z) \\
        w_k &= (k+1)^r \max_{i \le k} (lr_i d_{i+1})^2

    with :math:`w_k` the weight of :math:`z'` in the average x.

    It is ``sf_jax.schedule_free_prodigy``, and a :class:`ScheduleFreeWrapper`. It needs
    the package ``prodigyopt``.

    Args:
      params: parameters or groups of them, as for any torch optimizer. Prodigy has one
        d, and so one ``lr``, for all groups.
      lr: a factor on Prodigy's own step size, 1 unless you know better.
      betas: (β, b2): the weight of x in y, in [0, 1], and the decay rate of the
        second moment, in [0, 1). They are the same for all groups. Later β is
        ``optimizer.momentum``, as of every wrapper.
      eps: added to the root of the second moment, times d.
      weight_decay: λ, decoupled and times the step size, at z.
      warmup_steps: steps of linear warmup.
      r: steps are weighed by ``(k + 1) ** r``.
      weight_lr_power: and by the largest step size so far, ``lr_k d``, to this power.
      inner_momentum: Prodigy's own first moment, in [0, 1); β takes its place.
      estim_lr0: the first d, smaller than the distance to the solution; prodigyopt's
        ``d0``.
      estim_lr_coef: a factor on the estimates of d; prodigyopt's ``d_coef``.
      weight_decay_at_y: λ of a decay at y; see :class:`ScheduleFreeWrapper`.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for.

    Raises:
      ImportError: ``prodigyopt`` is not installed.
      ValueError: an argument out of its range.
      TypeError: ``warmup_steps`` that is not a whole number.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.ProdigyScheduleFree([w])
      >>> optimizer.train()
      >>> for _ in range(200):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True

    References:
      Mishchenko and Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free
        Learner*, https://arxiv.org/abs/2306.06101
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        inner_momentum: float = 0.0,
        estim_lr0: float = 1e-6,
        estim_lr_coef: float = 1.0,
        weight_decay_at_y: float = 0.0,
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        _checks.betas("betas", betas)
        _checks.decay_rate("inner_momentum", inner_momentum)
        _checks.non_negative("eps", eps)
        _checks.non_negative("weight_decay", weight_decay)
        try:
            import prodigyopt
        except ImportError as error:
            raise ImportError(
                "ProdigyScheduleFree needs the package prodigyopt, which cannot be "
                f"imported ({error}). Install it: pip install prodigyopt."
            ) from error
        base = prodigyopt.Prodigy(
            params,
            lr=lr,
            # Where its first beta is 0, prodigyopt steps with the d that the step has
            # found. The formula steps with the former d, as prodigyopt does elsewhere.
            betas=(inner_momentum or 1e-30, betas[1]),
            eps=max(eps, EPS_FLOOR),
            weight_decay=weight_decay,
            use_bias_correction=True,
            d0=estim_lr0,
            d_coef=estim_lr_coef,
        )
        super().__init__(
            base,
            weight_decay_at_y,
            betas[0],
            weight_lr_power,
            r,
            warmup_steps=warmup_steps,
            store_x=store_x,
            state_dtype=state_dtype,
            skip_nonfinite=skip_nonfinite,
        )
