"""ScheduleFree+: no schedule and no learning rate to tune; the loss sets the step.

With the loss f at y, and sums over the parameters of all groups,

    I    = β_k Σ g·(z - x)
    e    = p e + (1 - p) sqrt(π/2) Σ|g|,   ê = e / (1 - p^(k+1))
    lr_k = max(lr, eps) · max(0, f + I) / ê

and lr_k = 0 where the loss is not finite. The base step is AdamW's with momentum, whose
decay is scaled by lr_k twice (AdamC), the average begins after ``c_warmup`` steps, and
β may grow:

    1 - β_k = (1 - β_0)^(1-s) (1 - β_max)^s,   s = min(1, k / anneal_steps)

References:
  Defazio, *ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to
    Large Language Models*, https://arxiv.org/abs/2605.19095
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _checks
from sf_torch._optimizer import ScheduleFree, bookkeeping
from sf_torch._optimizers.adamw import AdamWScheduleFree
from sf_torch._optimizers.forms import Reference
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group, one_minus_power


class AdamCScheduleFreePlus(AdamWScheduleFree):
    """ScheduleFree+, AdamC with a Polyak step size, for large runs.

        lr_k = max(lr, eps) · max(0, f + β_k Σ g·(z - x)) / ê
        z'   = z - lr_k m̂ / (sqrt(v̂) + eps) - lr_k² λ y
        x'   = (1 - c_k) x + c_k z'
        y'   = (1 - β_k) z' + β_k x'

    with f the loss, and ê the size of the gradient over all groups (see the module).
    Call ``step_func(function_value=loss)`` after ``loss.backward()``, or
    ``step(closure)``. With several processes the mean of their losses is taken.

    Args:
      params: parameters or groups of them, as for any torch optimizer.
      lr: a factor on the step size, 1 unless you know better.
      betas: decay rates of the first and the second moment, in [0, 1). Not β, unlike
        elsewhere.
      sf_beta1: β, the weight of x in y, in [0, 1].
      eps: added to the root of v, and the least ``lr``.
      weight_decay: λ, times the square of the step size, at y. That makes good values
        far larger than AdamW's.
      r: steps are weighed by ``(k + 1) ** r``.
      polyak_beta: decay rate of the mean of the gradients' size, in [0, 1); 0 for the
        present gradient alone. One for all groups, as the mean is; a group that is
        added later takes the mean up as it stands.
      c_warmup: steps before the average begins; until then x is z.
      sf_beta1_anneal_steps: steps in which β goes to ``sf_beta1_max``; 0 for constant.
      sf_beta1_max: β after those steps, in [0, 1).
      weight_lr_power: and by the largest step size so far to this power.
      foreach: False for one parameter at a time, else as many as pay.
      fused: one kernel for the whole step (CUDA, with Triton); None where it works.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      upstream_compatible: follow the published code also where it corrects its mean
        of the gradients' size for bias again and again, so that with
        ``polyak_beta > 0`` the step size vanishes, and correct bias by the group's
        count of steps, not by each parameter's own.
      moment_dtype: dtype of the moments; by default that of each parameter, float32
        for those narrower than it, whatever ``state_dtype`` is. A bfloat16 second
        moment stalls: its changes are smaller than its rounding.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for.

    Raises:
      ValueError: an argument out of its range.
      TypeError: a number of steps that is not a whole number.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.AdamCScheduleFreePlus([w])
      >>> optimizer.train()
      >>> for _ in range(200):
      ...     optimizer.zero_grad()
      ...     loss = w.square().sum()
      ...     loss.backward()
      ...     _ = optimizer.step_func(function_value=loss)
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True

    References:
      Defazio, *ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to
        Large Language Models*, https://arxiv.org/abs/2605.19095
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        sf_beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0,
        polyak_beta: float = 0,
        c_warmup: int = 0,
        sf_beta1_anneal_steps: int = 0,
        sf_beta1_max: float = 0.965,
        weight_lr_power: float = 2,
        foreach: bool | None = None,
        *,
        fused: bool | None = None,
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        upstream_compatible: bool = False,
        moment_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "sf_beta1": sf_beta1,
            "eps": eps,
            "weight_decay": weight_decay,
            "r": r,
            "polyak_beta": polyak_beta,
            "c_warmup": c_warmup,
            "sf_beta1_anneal_steps": sf_beta1_anneal_steps,
            "sf_beta1_max": sf_beta1_max,
            "weight_lr_power": weight_lr_power,
            "foreach": foreach,
            "decay_at": "y",
            "upstream_compatible": upstream_compatible,
            "moment_dtype": moment_dtype,
            "grad_l1_ema": 0.0,
            # What Meta's class of this name keeps in its groups besides, for logs.
            "grad_l1_ema_corr": 0.0,
            "function_value_ema": 0.0,
            "ip_term": 0.0,
            "polyak_denom_ema": 0.0,  # which it asks for, and never uses
        }
        options |= bookkeeping(
            store_x, state_dtype, fused, skip_nonfinite=skip_nonfinite
        )
        ScheduleFree.__init__(self, params, options)

    def _check_group(self, group: Group, first: Group) -> None:
        if group["capturable"]:
            raise ValueError(
                "capturable=True does not go with a step size that is found on the "
                "host, from the loss. Leave it out."
            )
        super()._check_group(group, first)
        _checks.decay_rate("betas[0]", group["betas"][0])
        for name in ("polyak_beta", "upstream_compatible"):
            if group[name] != first[name]:
                raise ValueError(
                    f"{name} must be one for all groups, got {first[name]} and "
                    f"{group[name]}: the mean of the gradients' size is over all of "
                    "them. Give it to the optimizer, not to a group."
                )
        if group["sf_beta1_anneal_steps"]:
            # An average that is all of y could never be left again.
            _checks.decay_rate("sf_beta1", group["sf_beta1"])

    def step_func(self, function_value: float | Tensor) -> Any:
        """One step from the gradients and the loss at y.

        Args:
          function_value: the loss that the gradients belong to.

        Returns:
          function_value.

        Raises:
          RuntimeError: in eval mode, or for sparse gradients; nothing has moved then.
        """
        return self.step(lambda: function_value)

    def _measure(self, loss: Any, drafts: list[Group]) -> None:
        if loss is None:
            raise TypeError(
                "ScheduleFree+ needs the loss: call step_func(function_value=loss) "
                "after loss.backward(), or step(closure) with a closure that returns "
                "it."
            )
        inner, norm = self._sums()
        gap = mean_over_processes(loss) + inner
        # One mean for all groups, kept in each; the first has all its steps.
        first = drafts[0]
        p = first["polyak_beta"]
        mean = p * first["grad_l1_ema"] + (1 - p) * math.sqrt(math.pi / 2) * norm
        corrected = mean / one_minus_power(p, first["k"])
        kept = corrected if first["upstream_compatible"] else mean
        for draft in drafts:
            draft["grad_l1_ema"] = kept
            lr = max(float(draft["lr"]), draft["eps"])
            # Without a gradient there is no direction either, and any step will do.
            # After a loss that is not finite there is no step.
            moves = corrected and math.isfinite(gap)
            draft["scheduled_lr"] = lr * max(0.0, gap) / corrected if moves else 0.0
            logged = {"function_value_ema": gap, "ip_term": inner}
            draft.update(logged, grad_l1_ema_corr=corrected)

    def _sums(self) -> tuple[float, float]:
        """``Σ β g·(z - x)`` and ``Σ|g|`` over all groups, and all shards of them."""
        sums: dict[torch.device, list[Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self._state_of(p, group)["z"]
                g = p.grad.to(z.dtype)
                inner = (g.conj() * (z - self._x(p, group))).real.sum()
                pair = torch.stack(
                    [self._beta(group) * whole(inner), whole(g.abs().sum())]
                )
                sums.setdefault(p.device, []).append(pair)
        totals = [torch.stack(pairs).sum(0).tolist() for pairs in sums.values()]
        return sum(t[0] for t in totals), sum(t[1] for t in totals)

    # The seams

    def _beta(self, group: Group) -> float:
        start, steps = group["sf_beta1"], group["sf_beta1_anneal_steps"]
        if not steps:
            return start
        s = min(1.0, group["k"] / steps)
        at_end = math.log1p(-group["sf_beta1_max"])
        return -math.expm1((1 - s) * math.log1p(-start) + s * at_end)

    def _step_size(self, group: Group) -> float:
        return group["scheduled_lr"]

    def _weight(self, group: Group, lr: float) -> float:
        if group["k"] >= group["c_warmup"]:
            return super()._weight(group, lr)
        group["lr_max"] = max(lr, group["lr_max"])
        return 1.0

    def _inner_momentum(self, group: Group) -> float:
        return group["betas"][0]

    def _base_numbers(
        self, group: Group, lr: float, k: Any, corrected: bool = True
    ) -> Numbers:
        numbers = super()._base_numbers(group, lr, k, corrected)
        return numbers._replace(decay=lr * numbers.decay)


class AdamCScheduleFreePlusPaper(Reference, AdamCScheduleFreePlus):
    """:class:`AdamCScheduleFreePlus` with x, y and z all stored, as Meta's is."""


def whole(total: Tensor) -> Tensor:
    """A sum over a distributed tensor, over all its shards."""
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def mean_over_processes(loss: float | Tensor) -> float:
    """The loss of all processes' batches, whose gradients have been averaged too."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = torch.as_tensor(loss).detach().clone()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()
    return float(loss)
