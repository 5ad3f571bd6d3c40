"""Schedule-Free AdamW, and the form whose bias correction enters the step size.

    v  = b2 v + (1 - b2) |g|²
    z' = z - lr_k (ĝ / (sqrt(v / (1 - b2^(k+1))) + eps) + λ p)

with ĝ = g, or with ``inner_momentum`` b: m = b m + (1 - b) g, ĝ = m / (1 - b^(k+1)).

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments
from sf_torch._optimizer import ScheduleFree, bookkeeping
from sf_torch._optimizers.forms import Closure, Reference
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group, adam, one_minus_power, where


class AdamWScheduleFree(ScheduleFree):
    r"""Schedule-Free AdamW.

    .. math::

        lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
        v &= b_2 v + (1 - b_2) |g|^2 \\
        z' &= z - lr_k \left( \frac{g}{\sqrt{v / (1 - b_2^{k+1})} + \epsilon}
              + \lambda p \right) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    with p the iterate that ``decay_at`` names. With ``inner_momentum`` b, g in z' is
    :math:`m / (1 - b^{k+1})`, where :math:`m = b m + (1 - b) g`.

    Args:
      params: parameters or groups of them, as for any torch optimizer.
      lr: step size; good values are 1 to 10 times those of AdamW with a schedule.
      betas: (β, b2): the weight of x in y, in [0, 1], and the decay rate of the
        second moment, in [0, 1).
      eps: added to the root of v.
      weight_decay: λ, decoupled and times the learning rate.
      warmup_steps: steps of linear warmup.
      r: steps are weighed by ``(k + 1) ** r``.
      weight_lr_power: and by the largest learning rate so far to this power.
      inner_momentum: decay rate of a first moment in the numerator, in [0, 1); 0 for
        the plain gradient, which keeps no first moment.
      foreach: False for one parameter at a time, else as many as pay.
      decay_at: "y", "z" or "x": what the decay pulls towards zero by.
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
        stochastic. v is computed in float32 and rounded once, but for the AlgoPerf
        classes, which round as :class:`AdamWScheduleFreeAlgoPerf` says.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=torch.bfloat16``: y (of bfloat16 parameters), z, x, and the
        moments where ``moment_dtype`` is bfloat16 too. Rounded at random, small steps
        are not lost. The random bits depend on ``seed``, the group's k and the places
        of parameter and element. Slow: it is the plain formula, neither ``fused`` nor
        compiled.
      seed: from 0 to 2^32 - 1, of the random bits.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for, unless ``capturable``.

    Raises:
      ValueError: an argument out of its range, or ``rounding="stochastic"`` with
        another ``state_dtype`` than bfloat16, with ``fused`` or ``capturable``, or for
        distributed parameters.
      TypeError: an argument of a wrong type; ``warmup_steps`` that is not whole.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.AdamWScheduleFree([w], lr=0.1, warmup_steps=10)
      >>> optimizer.train()
      >>> for _ in range(200):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> with optimizer.eval_mode():
      ...     bool(w.norm() < 0.2)
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
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        inner_momentum: float = 0.0,
        foreach: bool | None = None,
        *,
        decay_at: str = "y",
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
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "foreach": foreach,
            "inner_momentum": inner_momentum,
            "decay_at": decay_at,
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
        if self._inner_momentum(group):
            return "exp_avg_sq", "exp_avg"
        return ("exp_avg_sq",)

    def _inner_momentum(self, group: Group) -> float:
        """Decay rate of the first moment in the numerator; 0 for no such moment."""
        return group["inner_momentum"]

    def _base_numbers(
        self, group: Group, lr: float, k: Any, corrected: bool = True
    ) -> Numbers:
        return adam(
            lr,
            k,
            self._inner_momentum(group),
            group["betas"][1],
            group["eps"],
            float(group["weight_decay"]),
            group["decay_at"],
            corrected,
        )


class AdamWScheduleFreePaper(AdamWScheduleFree):
    r"""Schedule-Free AdamW with the bias correction in the step size.

    .. math::

        lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \, \sqrt{1 - b_2^{k+1}} \\
        z' &= z - lr_k \left( \frac{g}{\sqrt v + \epsilon} + \lambda p \right)

    The averaging weight sees this lr_k too. Arguments and errors are those of
    :class:`AdamWScheduleFree`.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.ones(2))
      >>> optimizer = sf_torch.AdamWScheduleFreePaper([w], lr=0.1)
      >>> optimizer.train()
      >>> w.sum().backward()
      >>> optimizer.step()
      >>> [round(value, 3) for value in w.tolist()]
      [0.9, 0.9]

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
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        **options: Any,
    ) -> None:
        # The order of the arguments is that of Meta's class of this name.
        common = (lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power)
        super().__init__(params, *common, foreach=foreach, **options)

    def _step_size(self, group: Group) -> float:
        correction = one_minus_power(group["betas"][1], group["k"])
        return super()._step_size(group) * correction**0.5

    def _base_numbers(
        self, group: Group, lr: float, k: Any, corrected: bool = False
    ) -> Numbers:
        # lr has the correction of the group's count; the step has the parameter's.
        b2 = group["betas"][1]
        ratio = one_minus_power(b2, k) / one_minus_power(b2, group["k"])
        return super()._base_numbers(group, lr * ratio**0.5, k, corrected)


class AdamWScheduleFreeAlgoPerf(AdamWScheduleFree):
    r"""Schedule-Free AdamW as it won the self-tuning track of AlgoPerf.

    .. math::

        lr_k &= \max(\epsilon, lr \cdot \min(1, (k+1) / warmup\_steps)) \\
        z' &= z - lr_k \sqrt{1 - b_2^{k+1}}
              \left( \frac{g}{\sqrt v + \epsilon} + \lambda x \right)

    The averaging weight sees lr_k alone. The entry had r = 0.75, b2 = 0.9955 and a
    warmup of 2% of 0.75 of the step hint. Arguments and errors are those of
    :class:`AdamWScheduleFree`, but for ``decay_at``, which is "x" by default.

    The entry kept v in bfloat16, as ``moment_dtype=torch.bfloat16`` does here, and
    moved it by PyTorch's in-place operations, each of which computes in float32 and
    rounds what it stores. With R for rounding to ``moment_dtype``, to nearest,

    .. math::

        v = R(R(b_2 v) + (1 - b_2) g^2)

    and the denominator is :math:`R(R(\sqrt v) + \epsilon)`, with an :math:`\epsilon` of
    at least the root of the smallest normal number of ``moment_dtype``: 0.0078 in
    float16, where the entry's rounds to 0. This is another trajectory than a float32 v
    has. Only the plain formula takes it, on GPUs too: one parameter at a time, and not
    compiled.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.ones(2))
      >>> optimizer = sf_torch.AdamWScheduleFreeAlgoPerf([w], lr=0.1)
      >>> optimizer.train()
      >>> w.sum().backward()
      >>> optimizer.step()
      >>> [round(value, 3) for value in w.tolist()]
      [0.9, 0.9]

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
      https://github.com/mlcommons/submissions_algorithms (``schedule_free_adamw``)
    """

    _default_decay_at = "x"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"decay_at": self._default_decay_at, **options})

    def _step_size(self, group: Group) -> float:
        lr, least = super()._step_size(group), group["eps"]
        return where(lr > least, lr, least)

    def _base_numbers(
        self, group: Group, lr: float, k: Any, corrected: bool = False
    ) -> Numbers:
        correction = one_minus_power(group["betas"][1], k)
        numbers = super()._base_numbers(group, lr * correction**0.5, k, corrected)
        return numbers._replace(v_in_place=group["moment_dtype"] is not None)


class AdamWScheduleFreeAlgoPerfV2(AdamWScheduleFreeAlgoPerf):
    r"""Schedule-Free AdamW as its authors handed it in to AlgoPerf again.

    .. math::

        lr_k &= \max(\epsilon, lr \cdot \min(1, (k+1) / warmup\_steps)) \\
        z' &= z - lr_k \sqrt{1 - b_2^{k+1}}
              \left( \frac{g}{\sqrt v + \epsilon} + \lambda y \right)

    The rule of :class:`AdamWScheduleFreeAlgoPerf` with the decay at y. The entry had
    r = 0, a float32 v, and took BatchNorm statistics at x. Arguments and errors are
    those of :class:`AdamWScheduleFree`.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.ones(2))
      >>> optimizer = sf_torch.AdamWScheduleFreeAlgoPerfV2([w], lr=0.1)
      >>> optimizer.train()
      >>> w.sum().backward()
      >>> optimizer.step()
      >>> [round(value, 3) for value in w.tolist()]
      [0.9, 0.9]

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
      https://github.com/mlcommons/submissions_algorithms (``schedule_free_adamw_v2``)
    """

    _default_decay_at = "y"


class AdamWScheduleFreeReference(Reference, AdamWScheduleFree):
    """:class:`AdamWScheduleFree` with x, y and z all stored."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        decay_at_z: bool = False,
        *args: Any,
        **options: Any,
    ) -> None:
        common = (lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power)
        if _arguments.check("decay_at_z", decay_at_z):
            options["decay_at"] = "z"
        super().__init__(params, *common, *args, **options)

    # Meta's class of this name keeps in its groups whether decay is taken at z.

    def add_param_group(self, param_group: Group) -> None:
        at_z = param_group.get("decay_at_z", False)
        if _arguments.check("decay_at_z", at_z):
            param_group["decay_at"] = "z"
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["decay_at_z"] = group["decay_at"] == "z"

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            if "decay_at" not in group and "decay_at_z" in group:
                group["decay_at"] = "z" if group["decay_at_z"] else "y"
        super().__setstate__(state)
        for group in self.param_groups:
            group["decay_at_z"] = group["decay_at"] == "z"


class AdamWScheduleFreeClosure(Closure, AdamWScheduleFree):
    """:class:`AdamWScheduleFree` for ``step(closure)``, without modes to switch."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        **options: Any,
    ) -> None:
        # The order of the arguments is that of Meta's class of this name.
        common = (lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power)
        super().__init__(params, *common, foreach=foreach, **options)
