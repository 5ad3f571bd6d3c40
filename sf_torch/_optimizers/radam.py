"""Schedule-Free RAdam: AdamW whose step size is rectified, without warmup.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond*,
    https://arxiv.org/abs/1908.03265 (the rectification)
"""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from sf_torch._optimizer import ScheduleFree, bookkeeping
from sf_torch._optimizers.forms import Closure, Reference
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group, adam, number, rectification, where


class RAdamScheduleFree(ScheduleFree):
    r"""Schedule-Free RAdam, which needs no warmup.

    With :math:`t = k + 1` and

    .. math::

        \rho_\infty = \frac{2}{1 - b_2} - 1, \qquad
        \rho = \rho_\infty - \frac{2 t b_2^t}{1 - b_2^t}

    the step size where :math:`\rho > 4` is

    .. math::

        lr_k = lr \sqrt{\frac{(\rho - 4) (\rho - 2) \rho_\infty}
                             {(\rho_\infty - 4) (\rho_\infty - 2) \rho}}

    and the direction is Adam's. In the first steps, where :math:`\rho \le 4`, lr_k is
    0 (``silent_sgd_phase``), or lr with the plain gradient.

    Args:
      params: parameters or groups of them, as for any torch optimizer.
      lr: step size.
      betas: (β, b2): the weight of x in y, in [0, 1], and the decay rate of the
        second moment, in [0, 1).
      eps: added to the root of v.
      weight_decay: λ, decoupled and times the learning rate, at y.
      r: steps are weighed by ``(k + 1) ** r``.
      weight_lr_power: and by the largest learning rate so far to this power.
      foreach: False for one parameter at a time, else as many as pay.
      silent_sgd_phase: whether the first steps move nothing.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      fused: one kernel for the whole step (CUDA, with Triton); None where it works.
      capturable: counters on the device, for CUDA graphs; needs ``fused``. An ``lr``
        that is to change between replays must be a tensor there.
      upstream_compatible: correct bias by the group's count of steps, as
        ``schedulefree`` does. By default each parameter has its own count, as in
        ``torch.optim``; with the group's, the first steps of a parameter whose
        gradients begin late are up to ``1 / sqrt(1 - b2)`` times too long.
      moment_dtype: dtype of the moments; by default that of each parameter, float32
        for those narrower than it, whatever ``state_dtype`` is. A bfloat16 second
        moment stalls: its changes are smaller than its rounding, unless that is
        stochastic.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=torch.bfloat16``: as in :class:`AdamWScheduleFree`.
      seed: from 0 to 2^32 - 1, of the random bits.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for, unless ``capturable``.

    Raises:
      ValueError: an argument out of its range.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.RAdamScheduleFree([w], lr=0.5)
      >>> optimizer.train()
      >>> for _ in range(200):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        silent_sgd_phase: bool = True,
        *,
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        upstream_compatible: bool = False,
        moment_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "foreach": foreach,
            "silent_sgd_phase": silent_sgd_phase,
            "upstream_compatible": upstream_compatible,
            "moment_dtype": moment_dtype,
        }
        super().__init__(
            params,
            options
            | bookkeeping(
                store_x, state_dtype, fused, capturable, rounding, seed, skip_nonfinite
            ),
        )

    def _moments(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg_sq",)

    def _step_size(self, group: Group) -> float:
        rectified, factor = rectification(group["betas"][1], group["k"])
        sgd = 0.0 if group["silent_sgd_phase"] else 1.0
        lr = number(group["lr"], keep_tensor=self._way(group).captures)
        return lr * where(rectified, factor, sgd)

    def _base_numbers(self, group: Group, lr: float, k: Any) -> Numbers:
        b2, decay = group["betas"][1], float(group["weight_decay"])
        numbers = adam(lr, k, 0.0, b2, group["eps"], decay, "y")
        rectified, _ = rectification(b2, group["k"])
        # Divided by 0 sqrt(v) + 1, the direction is the plain gradient.
        return numbers._replace(
            root=where(rectified, numbers.root, 0.0),
            eps=where(rectified, numbers.eps, 1.0),
        )


class RAdamScheduleFreeReference(Reference, RAdamScheduleFree):
    """:class:`RAdamScheduleFree` with x, y and z all stored."""


class RAdamScheduleFreeClosure(Closure, RAdamScheduleFree):
    """:class:`RAdamScheduleFree` for ``step(closure)``, without modes to switch."""
