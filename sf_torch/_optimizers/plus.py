"""ScheduleFree+: no schedule and no learning rate to tune; the loss sets the step.

With the loss f at y, and sums over the parameters of all groups,

    I    = β_k Σ g·(z - x)
    e    = p e + (1 - p) sqrt(π/2) Σ|g|,   ê = e / (1 - p^(k+1))
    lr_k = max(lr, eps) · max(0, f - f_low + I) / ê

and lr_k = 0 where the loss is not finite. f_low is the least loss that is thought
possible, 0 in the paper. The base step is AdamW's with momentum, whose
decay is scaled by lr_k twice (AdamC), the average begins after ``c_warmup`` steps, and
β may grow:

    1 - β_k = (1 - β_0)^(1-s) (1 - β_max)^s,   s = min(1, k / anneal_steps)

References:
  Defazio, *ScheduleFree+: Scaling Learning-Rate-Free & Schedule-Free Learning to
    Large Language Models*, https://arxiv.org/abs/2605.19095
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments, distributed
from sf_torch._optimizer import Part, ScheduleFree, bookkeeping
from sf_torch._optimizers.adamw import AdamWScheduleFree
from sf_torch._optimizers.forms import Reference
from sf_torch._step.batches import is_flat, of_all_shards, wide_dtype
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group, one_minus_power


class AdamCScheduleFreePlus(AdamWScheduleFree):
    r"""ScheduleFree+, AdamC with a Polyak step size, for large runs.

    .. math::

        e' &= p e + (1 - p) \sqrt{\pi / 2} \sum |g|, \qquad
              \hat e = e' / (1 - p^{k+1}) \\
        lr_k &= \max(lr, \epsilon) \,
                \max(0, f - f_{low} + \beta_k \sum g \cdot (z - x)) / \hat e \\
        z' &= z - lr_k \frac{\hat m}{\sqrt{\hat v} + \epsilon} - lr_k^2 \lambda y \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta_k) z' + \beta_k x'

    with f the loss, :math:`f_{low}` the ``loss_floor`` and p the ``polyak_beta``. The
    sums run over the parameters of all groups. Call
    ``step_func(function_value=loss)`` after ``loss.backward()``, or ``step(closure)``.

    The loss is the mean over all that the gradients are of: over accumulated
    micro-batches, and over the processes that train the model together, since they
    must all take the same step. Distributed tensors (FSDP2, HSDP, tensor parallelism)
    tell which processes these are, and so does ``process_group``: along them the mean
    is taken here. Nothing tells of DDP: pass ``sf_torch.mean_loss(loss)``.

    Gradients that were clipped make the sums too small and the step too long. Give
    their norm before that, ``step_func(loss, grad_norm=norm)`` with what
    ``clip_grad_norm_`` returns: the step size is then that of the whole gradients.

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
      loss_floor: f_low, the least loss that is thought possible, in the loss's unit: a
        finite number, or a function of k (0 at the first step) that gives one. 0 suits
        a model that can come near a loss of 0; where it cannot, steps come out too long
        near the end. Too high a floor stops training once the loss is there: steps are
        0 where ``f - f_low + I`` is not positive. One for all groups, which hold its
        present value; a function is not part of the state dict, so give it anew.
      process_group: the processes that hold other parts of the parameters, which the
        tensors do not show: FSDP1's shards, the partitions of
        ``ZeroRedundancyOptimizer``, pipeline stages. The sums go over all of them, and
        the mean of their losses is taken; a step is two all-reduces, which all of
        them must reach. Not for DDP, where each has all parameters. None for none.

    Raises:
      ValueError: an argument out of its range, or parameters of FSDP1 without
        ``process_group``.
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

    _kinds = _arguments.OF_MOMENTS

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
        loss_floor: float | Callable[[int], float] = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.process_group = _arguments.check("process_group", process_group)
        if callable(loss_floor):
            self._floor_at, loss_floor = loss_floor, _floor(loss_floor)
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
            "loss_floor": loss_floor,
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

    # A schedule of the floor, which is no number that a group could hold.
    _floor_at: Callable[[int], float] | None = None
    process_group: dist.ProcessGroup | None = None
    _told: Mapping[str, Any] = MappingProxyType({})
    _may_warn = True

    def _check_group(self, group: Group, first: Group) -> None:
        if group["capturable"]:
            raise ValueError(
                "capturable=True does not go with a step size that is found on the "
                "host, from the loss. Leave it out."
            )
        super()._check_group(group, first)
        if self.process_group is None and any(map(is_flat, group["params"])):
            raise ValueError(
                "the parameters are parts of FSDP1's, and a step size from the sums "
                "over one part would differ between processes. Pass process_group=, "
                "the group that they are sharded over (torch.distributed.group.WORLD "
                "unless you gave another), or shard with fully_shard."
            )
        for name in ("polyak_beta", "upstream_compatible", "loss_floor"):
            follows = name == "loss_floor" and self._floor_at
            if group[name] != first[name] and not follows:
                raise ValueError(
                    f"{name} must be one for all groups, got {first[name]} and "
                    f"{group[name]}: the step size is found from all of them "
                    "together. Give it to the optimizer, not to a group."
                )
        if group["sf_beta1_anneal_steps"]:
            # An average that is all of y could never be left again.
            _arguments.check("sf_beta1", group["sf_beta1"], _arguments.DECAY_RATE)

    def step_func(
        self, function_value: float | Tensor, grad_norm: float | Tensor | None = None
    ) -> Any:
        """One step from the gradients and the loss at y.

        Args:
          function_value: the loss that the gradients belong to.
          grad_norm: the Euclidean norm that the gradients of all parameters here had
            together before they were clipped by one factor; None if they were not.
            Clipping element by element is no factor: the sums are then scaled by the
            ratio of the norms, which is not quite right.

        Returns:
          function_value.

        Raises:
          RuntimeError: in eval mode, or for sparse gradients; nothing has moved then.
        """
        self._told = MappingProxyType({})  # of a step that was never taken
        self.tell(grad_norm=grad_norm)
        return self.step(lambda: function_value)

    def tell(
        self,
        *,
        loss: float | Tensor | None = None,
        grad_norm: float | Tensor | None = None,
    ) -> None:
        """Tells the next step what ``step()`` and ``step(closure)`` cannot be given.

        For those that call them themselves, such as ``GradScaler.step`` and trainers:
        the callback for Lightning and ``sf_torch.accelerate.tell_losses`` use it. The
        next step forgets it.

        Args:
          loss: the mean loss that the gradients belong to, in place of what a closure
            returns.
          grad_norm: as for :meth:`step_func`.
        """
        told = {"loss": loss, "grad_norm": grad_norm}
        news = {key: value for key, value in told.items() if value is not None}
        self._told = {**self._told, **news}

    @torch.no_grad()
    def grad_norm(self) -> float:
        """The Euclidean norm of all gradients here, over all shards of them."""
        found: dict[torch.device, list[Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    found.setdefault(p.device, []).append(_square(p.grad))
        squares = [sum(sum(torch.stack(each).tolist()) for each in found.values())]
        if self.process_group is not None:
            squares = distributed.totals(squares, self.process_group)
        return math.sqrt(squares[0])

    @torch.compiler.disable
    def _skips(self) -> bool:
        skips = super()._skips()
        looks = any(group["skip_nonfinite"] for group in self.param_groups)
        if looks and self.process_group is not None:  # which would wait for this one
            skips = distributed.totals([float(skips)], self.process_group)[0] > 0
        if skips:
            self._told = MappingProxyType({})
        return skips

    @torch.compiler.disable
    def _check_mode(self) -> None:
        super()._check_mode()
        for group in self.param_groups:
            # torch.compile turns it on, unasked, where it sees groups on a GPU.
            group["capturable"] = False

    @torch.compiler.disable
    def _prepare(self, loss: Any, compiles: bool) -> list[Any]:
        loss = self._told.get("loss", loss)
        if loss is None:
            raise TypeError(
                "ScheduleFree+ needs the loss: call step_func(function_value=loss) "
                "after loss.backward(), or step(closure) with a closure that returns "
                "it. In trainers: sf_torch.lightning.ScheduleFreeCallback() hands it "
                "over, and sf_torch.accelerate.tell_losses(accelerator, optimizer), "
                "for Hugging Face's Trainer with trainer.accelerator."
            )
        return super()._prepare(loss, compiles)

    def _measure(self, loss: Any, drafts: list[Group], parts: list[list[Part]]) -> None:
        inner, norm = self._sums(parts, self._told.get("grad_norm"))
        self._told = MappingProxyType({})
        # One mean for all groups, kept in each; the first has all its steps.
        first = drafts[0]
        floor = first["loss_floor"]
        if self._floor_at:
            floor = _arguments.check("loss_floor", self._floor_at(first["k"]))
        gap = self._mean_loss(loss) - floor + inner
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
            draft.update(logged, grad_l1_ema_corr=corrected, loss_floor=floor)

    def _sums(
        self, parts: list[list[Part]], grad_norm: float | Tensor | None
    ) -> tuple[float, float]:
        """``Σ β g·(z - x)`` and ``Σ|g|``, as before the gradients were clipped.

        Over all groups, all shards of them, and the process group.
        """
        rows: dict[Any, list[Tensor]] = {}
        for group, planned in zip(self.param_groups, parts, strict=True):
            betas = self._beta(group), group["b1"]
            for _, plan, grads in planned:
                for place, row in plan.sums(grads, *betas):
                    rows.setdefault(place, []).append(row)
        found = [0.0, 0.0]
        for place, here in rows.items():
            # The host waits for a device once, and adds in float64.
            numbers = torch.stack(here).tolist()
            sums = [sum(column) for column in zip(*numbers, strict=True)]
            if isinstance(place, tuple):
                sums = distributed.totals_over_mesh(sums, *place)
            found = [a + b for a, b in zip(found, sums, strict=True)]
        if self.process_group is not None:
            found = distributed.totals(found, self.process_group)
        inner, norm = found
        now = 0.0 if grad_norm is None else self.grad_norm()
        if grad_norm is not None and now > 0:
            # What undoes the factor that the gradients were multiplied by.
            factor = _number(grad_norm) / now
            inner, norm = factor * inner, factor * norm
        return inner, norm

    def _mean_loss(self, loss: float | Tensor) -> float:
        """The mean over the processes that are known to train the model together."""
        meshes = {
            p.device_mesh
            for group in self.param_groups
            for p in group["params"]
            if hasattr(p, "device_mesh")
        }
        mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)
        number, processes = _number(loss), 1
        if mesh is not None:
            number, processes = distributed.mean_over_mesh(number, mesh), mesh.size()
        if self.process_group is not None:
            together = dist.get_world_size(self.process_group)
            number = distributed.totals([number], self.process_group)[0] / together
            processes = max(processes, together)
        # One that has a graph comes from the model, and is the mean of nothing more.
        if self._may_warn and isinstance(loss, Tensor) and loss.requires_grad:
            self._may_warn = False
            distributed.warn_of_other_processes(processes)
        return number

    def __getstate__(self) -> dict[str, Any]:
        ours = {"_floor_at": self._floor_at, "process_group": self.process_group}
        return super().__getstate__() | ours

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


def _square(g: Tensor) -> Tensor:
    size = g.abs()
    return of_all_shards(size.to(wide_dtype(size.dtype)).square().sum())


def _number(value: float | Tensor) -> float:
    return float(of_all_shards(value) if isinstance(value, Tensor) else value)


def _floor(of_k: Callable[[int], float]) -> float:
    """The floor of the first step by a function of k, called before anything begins."""
    try:
        return _arguments.check("loss_floor", of_k(0))
    except Exception as error:
        raise TypeError(
            f"loss_floor must be a number or a function of k, got {of_k!r}, and with "
            f"k = 0 {type(error).__name__}: {error}"
        ) from error
