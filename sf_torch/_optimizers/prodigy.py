"""Schedule-Free Prodigy: neither a schedule nor a learning rate.

Prodigy moves z and estimates d, the distance to the solution, which multiplies the
learning rate. The average weighs each step by lr_k d, with the d that the step found.

The variant "algoperf" is the combination that Meta entered into AlgoPerf. It corrects
no bias, decays at x, steps with the d that the step found, and weighs by the number of
the step alone:

    v' = b2 v + (1 - b2) (d g)²
    n' = b3 n + d² lr_k Σ g·(z0 - z),    s' = b3 s + d² lr_k g
    d' = max(d, n' / Σ|s'|)
    z' = z - d lr_k (d' g / (sqrt(v') + d' eps) + λ x),    w_k = (k + 1)^0.75

References:
  Mishchenko and Defazio, *Prodigy: An Expeditiously Adaptive Parameter-Free Learner*,
    https://arxiv.org/abs/2306.06101
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  facebookresearch/schedule_free, ``schedulefree/algoperf/external_tuning/``
    ``schedule_free_prodigy/submission.py`` (the variant)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments
from sf_torch._optimizers.wrapper import ScheduleFreeWrapper
from sf_torch._step.batches import local
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
      weight_decay: λ, decoupled and times the step size, at z; in the variant at x,
        as the groups' ``weight_decay_at_x``.
      warmup_steps: steps of linear warmup.
      r: steps are weighed by ``(k + 1) ** r``; None for 0, in the variant 0.75.
      weight_lr_power: and by the largest step size so far, ``lr_k d``, to this power;
        None for 2, in the variant for 0.
      inner_momentum: Prodigy's own first moment, in [0, 1); β takes its place. The
        variant has none.
      estim_lr0: the first d, smaller than the distance to the solution; prodigyopt's
        ``d0``.
      estim_lr_coef: a factor on the estimates of d; prodigyopt's ``d_coef``.
      beta3: decay rate of the sums that estimate d, in [0, 1); None for the root of b2.
      safeguard_warmup: whether warmup is kept out of the denominator of that estimate,
        so that small first steps do not make d too large; not in the variant.
      variant: "standard", or "algoperf" for Meta's entry, which had b2 = 0.9955, and
        its second moment and sums in bfloat16. Here they are kept in full.
      weight_decay_at_y: λ of a decay at y; see :class:`ScheduleFreeWrapper`.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for.

    Raises:
      ImportError: ``prodigyopt`` is not installed.
      ValueError: an argument out of its range, or one that the variant does not have.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

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

    _kinds, _checked = _arguments.OF_PRODIGY, None

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float | None = None,
        weight_lr_power: float | None = None,
        *,
        inner_momentum: float = 0.0,
        estim_lr0: float = 1e-6,
        estim_lr_coef: float = 1.0,
        beta3: float | None = None,
        safeguard_warmup: bool = False,
        variant: str = "standard",
        weight_decay_at_y: float = 0.0,
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        b1, b2 = _arguments.check("betas", betas)
        given = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "inner_momentum": inner_momentum,
            "estim_lr0": estim_lr0,
            "estim_lr_coef": estim_lr_coef,
            "beta3": beta3,
            "safeguard_warmup": safeguard_warmup,
            "variant": variant,
        }
        _arguments.options(given, self._kinds)
        _arguments.check("lr", lr, _arguments.FACTOR)  # as prodigyopt has it
        as_entered = variant == "algoperf"
        if as_entered and (inner_momentum or safeguard_warmup):
            raise ValueError(
                f"safeguard_warmup={safeguard_warmup} and inner_momentum="
                f"{inner_momentum} have no place in variant='algoperf', which was "
                "published without either. Leave them out."
            )
        if r is None:
            r = 0.75 if as_entered else 0.0
        if weight_lr_power is None:
            weight_lr_power = 0.0 if as_entered else 2.0
        try:
            import prodigyopt
        except ImportError as error:
            raise ImportError(
                "ProdigyScheduleFree needs the package prodigyopt, which cannot be "
                f"imported ({error}). Install it: pip install prodigyopt."
            ) from error
        base = prodigyopt.Prodigy(
            params,
            lr=given["lr"],
            # Where its first beta is 0, prodigyopt steps with the d that the step has
            # found, as the entry does. The formula steps with the former d, as
            # prodigyopt does elsewhere.
            betas=(0.0 if as_entered else given["inner_momentum"] or 1e-30, b2),
            beta3=given["beta3"],
            eps=max(given["eps"], EPS_FLOOR),
            weight_decay=given["weight_decay"],
            use_bias_correction=not as_entered,
            safeguard_warmup=given["safeguard_warmup"],
            d0=given["estim_lr0"],
            d_coef=given["estim_lr_coef"],
        )
        super().__init__(
            base,
            weight_decay_at_y,
            b1,
            weight_lr_power,
            r,
            warmup_steps=warmup_steps,
            store_x=store_x,
            state_dtype=state_dtype,
            skip_nonfinite=skip_nonfinite,
        )
        if as_entered:
            self.defaults["weight_decay_at_x"] = given["weight_decay"]
            for group in self.param_groups:
                # The base's would act at z.
                group.setdefault("weight_decay_at_x", group["weight_decay"])
                group["weight_decay"] = 0.0

    def _moved_by_base(
        self, loss: Any, closure: Callable[[], Any] | None
    ) -> dict[Tensor, Tensor]:
        decays = {
            p: (self._new_x(p, group), group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and group.get("weight_decay_at_x")
        }
        first = self.param_groups[0]
        d, k = first["d"], first["k"]
        next_zs = super()._moved_by_base(loss, closure)
        if first["k"] == k:  # while all gradients are 0, Prodigy waits
            return next_zs
        with self._moving():  # as the base has
            for p, (x, group) in decays.items():
                share = d * float(group["lr"]) * group["weight_decay_at_x"]
                z = local(next_zs[p])
                z.sub_(local(x).to(z.dtype), alpha=share)
        return next_zs
