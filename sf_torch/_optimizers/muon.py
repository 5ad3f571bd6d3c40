"""Schedule-Free Muon: matrices under Muon or NorMuon, the rest under AdamW.

The formulas are those of :mod:`sf_torch.bases.muon` and of AdamW without momentum, each
of which moves z in its step.

References:
  Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
    https://arxiv.org/abs/2605.23061
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments
from sf_torch._optimizers.growing import OF_MUON, Growing
from sf_torch._optimizers.wrapper import ScheduleFreeWrapper
from sf_torch._step.batches import is_flat
from sf_torch._step.numbers import EPS_FLOOR
from sf_torch._step.schedule import Group
from sf_torch.bases import CombinedOptimizer, Muon


class MuonScheduleFree(ScheduleFreeWrapper):
    r"""Schedule-Free Muon; parameters that are not matrices move by AdamW.

    .. math::

        z' &= z - lr_k (s \, O(m) + \lambda z) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    with O(m) the momentum m of the gradients at y, orthogonalised, and s a factor for
    the matrix's shape (``adjust_lr_fn``).

    It is ``sf_jax.schedule_free_muon``, and a :class:`ScheduleFreeWrapper` over
    :class:`sf_torch.bases.Muon` and ``torch.optim.AdamW``.

    Args:
      params: parameters or groups of them, as for any torch optimizer. Real ones of
        two dimensions are Muon's. Each group becomes up to two, which keep its options:
        ``optimizer.param_groups`` has the groups of matrices first, in the given
        order, and then those of the rest. A group may have its own ``lr``,
        ``weight_decay``, ``eps``, ``weight_decay_at_y``, ``r``, ``weight_lr_power``
        and, for its matrices, any option of :class:`sf_torch.bases.Muon`.
      lr: step size of matrices and, unless ``adam_lr`` is given, of the rest.
      betas: (β, b2): the weight of x in y, in [0, 1], a number or
        :func:`~sf_torch.growing_b1`, and the decay rate of AdamW's second moment, in
        [0, 1). They are the same for all groups. Later β is ``optimizer.momentum``, as
        of every wrapper.
      eps: the least norm that Muon divides by, and added to the root of a second
        moment.
      weight_decay: λ, decoupled and times the learning rate, at z.
      warmup_steps: steps of linear warmup.
      r: steps are weighed by ``(k + 1) ** r``.
      weight_lr_power: and by the largest learning rate so far to this power.
      momentum: Muon's own, in [0, 1).
      row_b2: decay rate of the second moment of rows, in [0, 1), for NorMuon; None for
        Muon.
      nesterov: whether Muon's momentum looks ahead. It has no bias correction here,
        which optax's has.
      adjust_lr_fn: how a matrix's shape scales its step: "original" (or None) or
        "match_rms_adamw", which is ``consistent_rms=0.2`` in JAX. NorMuon always has
        the latter.
      adam_lr: step size of what is not a matrix; None for ``lr``.
      ns_steps: iterations of Newton-Schulz.
      ns_dtype: their dtype; None for that of the parameter, at least float32.
        ``torch.bfloat16``, which ``torch.optim.Muon`` has, is faster on accelerators.
      weight_decay_at_y: λ of a decay at y; see :class:`ScheduleFreeWrapper`.
      foreach: as for ``torch.optim.AdamW``.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for.
      upstream_compatible: β and x as in the published code of AMUSE, for
        ``growing_b1(b1, steps, rho)`` as β with ``warmup_steps=steps`` and a constant
        ``lr``. β follows from the averaging weight (see :mod:`.growing`) and grows
        sooner than in the paper: warmup weighs little. And x is recovered from y with
        this new β, although the former formed y, so that it comes nearer to z.

    Raises:
      ValueError: an argument out of its range, a group with betas of its own, or
        parameters of FSDP1, which are flat parts of matrices.
      TypeError: ``warmup_steps`` or ``ns_steps`` that is not a whole number, or params
        that are one tensor.

    Examples:
      >>> import torch, sf_torch
      >>> model = torch.nn.Linear(3, 2)
      >>> optimizer = sf_torch.MuonScheduleFree(model.parameters(), lr=0.05)
      >>> [tuple(group["params"][0].shape) for group in optimizer.param_groups]
      [(2, 3), (2,)]
      >>> optimizer.train()
      >>> model(torch.ones(3)).sum().backward()
      >>> optimizer.step()

    References:
      Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
        https://arxiv.org/abs/2605.23061
      Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
    """

    _kinds, _checked = OF_MUON, None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        betas: tuple[float | Growing, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        momentum: float = 0.95,
        row_b2: float | None = None,
        nesterov: bool = True,
        adjust_lr_fn: str | None = None,
        adam_lr: float | Tensor | None = None,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        weight_decay_at_y: float = 0.0,
        foreach: bool | None = None,
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        upstream_compatible: bool = False,
    ) -> None:
        beta, b2 = _arguments.check("betas", betas, OF_MUON["betas"])
        same: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        of_muon: dict[str, Any] = {
            "momentum": momentum,
            "row_b2": row_b2,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
        }
        for options in (same, of_muon):
            _arguments.options(options, self._kinds)
        same["eps"] = max(same["eps"], EPS_FLOOR)
        foreach = _arguments.check("foreach", foreach)
        adam_lr = _arguments.check("adam_lr", adam_lr)
        warmup_steps = _arguments.check("warmup_steps", warmup_steps)
        if _arguments.check("upstream_compatible", upstream_compatible):
            beta = _as_published(beta, warmup_steps)
        matrices, rest = _by_dimensions(params)
        if adam_lr is not None:
            rest = [{**group, "lr": adam_lr} for group in rest]
        bases: list[torch.optim.Optimizer] = []
        if matrices:
            bases.append(Muon(matrices, **of_muon, **same))
        if rest:
            # β takes the place of the first moment.
            adamw = torch.optim.AdamW(rest, betas=(0.0, b2), foreach=foreach, **same)
            bases.append(adamw)
        super().__init__(
            CombinedOptimizer(*bases),
            weight_decay_at_y,
            beta,
            weight_lr_power,
            r,
            warmup_steps=warmup_steps,
            store_x=store_x,
            state_dtype=state_dtype,
            skip_nonfinite=skip_nonfinite,
        )

    def _betas(self, group: Group, draft: Group, ckp1: float) -> tuple[float, float]:
        beta = self.momentum
        if not (isinstance(beta, Growing) and beta.by_weight):
            return super()._betas(group, draft, ckp1)
        power = float(group["r"] + group["weight_lr_power"])
        next_b1 = beta.of_weight(group["k"], ckp1, power)
        return next_b1, next_b1

    def _finish(self) -> None:
        beta = self.momentum
        if isinstance(beta, Growing) and beta.by_weight:
            for group, draft, _ in self._steps:
                share = group["b1"] / draft["b1"]
                moved = self._moved(group, group["params"])
                for _, state in moved if share != 1 else ():
                    if "x" in state:
                        state["x"].lerp_(state["z"], 1 - share)
                group["b1"] = draft["b1"]
        super()._finish()

    def add_param_group(self, param_group: Group) -> None:
        """Refuses groups that come after the optimizer has been built.

        Raises:
          ValueError: always, once it is built.
        """
        if self.param_groups is self.base.param_groups:
            raise ValueError(
                "MuonScheduleFree takes its groups when it is built. Give it all "
                "parameters then, also those that train later: a parameter stays as "
                "it is while it has no gradient."
            )
        super().add_param_group(param_group)


def _as_published(beta: Any, warmup_steps: int) -> Growing:
    if not isinstance(beta, Growing) or beta.b1 == 0:
        raise ValueError(
            "upstream_compatible=True needs a β that grows from above 0, got "
            f"betas[0] = {beta}. Pass growing_b1(0.6, steps=6000, rho=0.8) there."
        )
    if warmup_steps != beta.steps:
        raise ValueError(
            "upstream_compatible needs the warmup that β waits for, got warmup_steps="
            f"{warmup_steps}. Pass warmup_steps={beta.steps}."
        )
    return dataclasses.replace(beta, by_weight=True)


def _by_dimensions(params: ParamsT) -> tuple[list[Any], list[Any]]:
    """Groups of the matrices, and groups of the rest, each with its group's options."""
    given: list[Any] = list(_arguments.check("params", params))
    groups: list[dict[str, Any]]
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        if "betas" in group:
            raise ValueError(
                f"a group has betas {group['betas']} of its own, and they are the same "
                "for all groups here. Give betas to the optimizer, or build two."
            )
        params = group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        if odd := [m for m in members if not isinstance(_parameter(m), Tensor)]:
            raise TypeError(
                f"params must be parameters or groups of them, got {odd[0]!r}. Give "
                "model.parameters()."
            )
        if any(is_flat(_parameter(m)) for m in members):
            raise ValueError(
                "the parameters are parts of FSDP1's, which are flat, and Muon needs "
                "whole matrices. Use fully_shard (FSDP2), whose parameters keep their "
                "shapes, or DistributedDataParallel."
            )
        for kind, wants_matrices in ((matrices, True), (rest, False)):
            of_kind = [m for m in members if _is_matrix(m) == wants_matrices]
            if of_kind:
                kind.append({**group, "params": of_kind})
    return matrices, rest


def _parameter(member: Any) -> Tensor:
    """The parameter itself, where a pair (name, parameter) was given."""
    return member[1] if isinstance(member, tuple) else member


def _is_matrix(member: Any) -> bool:
    """Whether a parameter, or a pair (name, parameter), is Muon's."""
    p = _parameter(member)
    return bool(p.ndim == 2 and p.is_floating_point())
