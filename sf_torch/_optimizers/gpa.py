"""Generalized Primal Averaging (GPA) over AdamW: an exponential average of z.

    z' = (1 - lr_k λ) z - lr_k m̂ / (sqrt(v̂) + eps)
    x' = μ_x x + (1 - μ_x) z'
    y' = μ_y x' + (1 - μ_y) z'

It is the rule with c = 1 - μ_x and β = μ_y. With the μ_x of a plain mean,
1 - 1 / (k + 1), it is Schedule-Free AdamW with momentum.

The published code shrinks z and leaves y where it is. Since x is what y and z imply,
that pushes x away from zero by lr_k λ z (1 - μ_y) / μ_y; ``upstream_compatible`` does
the same.

References:
  Defazio et al., *Smoothing DiLoCo with Primal Averaging for Faster Training of
    LLMs*, https://arxiv.org/abs/2512.17131
  https://github.com/facebookresearch/optimizers (gpa, the published code)
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments
from sf_torch._optimizer import ScheduleFree, bookkeeping
from sf_torch._optimizers.adamw import AdamWScheduleFree
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group


class GPAAdamW(AdamWScheduleFree):
    r"""AdamW with Generalized Primal Averaging.

    .. math::

        z' &= (1 - lr_k \lambda) z - lr_k \frac{\hat m}{\sqrt{\hat v} + \epsilon} \\
        x' &= \mu_x x + (1 - \mu_x) z' \\
        y' &= \mu_y x' + (1 - \mu_y) z'

    Args:
      params: parameters or groups of them, as for any torch optimizer.
      lr: step size. Unlike Schedule-Free's, it may well decay.
      mu_y: weight of x in y, in [0, 1].
      mu_x: weight of the old x in the new, in [0, 1].
      betas: decay rates of the first and the second moment, in [0, 1).
      eps: added to the root of v.
      weight_decay: λ, decoupled and times the learning rate.
      warmup_steps: steps of linear warmup.
      foreach: False for one parameter at a time, else as many as pay.
      fused: one kernel for the whole step (CUDA, with Triton); None where it works.
      decay_at: "z", "y" or "x": what the decay pulls towards zero by.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      upstream_compatible: decay as the published code does, which moves x too (see
        the module), at "z" or "y", and correct bias by the group's count of steps,
        not by each parameter's own.
      moment_dtype: dtype of the moments; by default that of each parameter, float32
        for those narrower than it, whatever ``state_dtype`` is. A bfloat16 second
        moment stalls: its changes are smaller than its rounding, unless that is
        stochastic.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=torch.bfloat16``: as in :class:`AdamWScheduleFree`.
      seed: from 0 to 2^32 - 1, of the random bits.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for.

    Raises:
      ValueError: an argument out of its range, or ``rounding="stochastic"`` with
        ``upstream_compatible``, or where :class:`AdamWScheduleFree` refuses it.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.GPAAdamW([w], lr=0.1, mu_x=0.9)
      >>> optimizer.train()
      >>> for _ in range(200):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True

    References:
      Defazio et al., *Smoothing DiLoCo with Primal Averaging for Faster Training of
        LLMs*, https://arxiv.org/abs/2512.17131
    """

    _kinds = _arguments.OF_MOMENTS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        mu_y: float = 0.7,
        mu_x: float = 0.9967,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        foreach: bool | None = None,
        *,
        fused: bool | None = None,
        decay_at: str = "z",
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        upstream_compatible: bool = False,
        moment_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "mu_y": mu_y,
            "mu_x": mu_x,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "foreach": foreach,
            "decay_at": decay_at,
            "upstream_compatible": upstream_compatible,
            "moment_dtype": moment_dtype,
        }
        options |= bookkeeping(
            store_x, state_dtype, fused, False, rounding, seed, skip_nonfinite
        )
        ScheduleFree.__init__(self, params, options)

    def _check_group(self, group: Group, first: Group) -> None:
        super()._check_group(group, first)
        if not group["upstream_compatible"]:
            return
        if group["rounding"] == "stochastic":
            raise ValueError(
                'upstream_compatible does not go with rounding="stochastic": its decay '
                "rounds to nearest, and is lost. Leave upstream_compatible out."
            )
        if group["decay_at"] == "x" or not group["mu_y"]:
            raise ValueError(
                "upstream_compatible needs decay_at 'z' or 'y' and mu_y > 0, got "
                f"{group['decay_at']!r} and {group['mu_y']}: its decay moves x through "
                "y and z. Leave upstream_compatible out."
            )

    def _beta(self, group: Group) -> float:
        return group["mu_y"]

    def _weight(self, group: Group, lr: float) -> float:
        return 1 - group["mu_x"]

    def _inner_momentum(self, group: Group) -> float:
        return group["betas"][0]

    def _base_numbers(
        self, group: Group, lr: float, k: Any, corrected: bool = True
    ) -> Numbers:
        numbers = super()._base_numbers(group, lr, k, corrected)
        return numbers._replace(decay_moves_x=group["upstream_compatible"])
