"""Refined Schedule-Free: the length of the average apart from β, for every optimizer.

    c_k = min(1, (1 - β) C w_k / W_k)

with the w_k / W_k of the plain optimizer. C = 1 / (1 - β) is plain; more weighs late
steps more.

References:
  Song et al., *Through the River: Understanding the Benefit of Schedule-Free Methods
    for Language Model Training*, https://arxiv.org/abs/2507.09846
"""

from typing import Any

from sf_torch import _arguments
from sf_torch._optimizer import ScheduleFree
from sf_torch._optimizers.adamw import AdamWScheduleFree
from sf_torch._optimizers.radam import RAdamScheduleFree
from sf_torch._optimizers.sgd import SGDScheduleFree
from sf_torch._optimizers.wrapper import ScheduleFreeWrapper
from sf_torch._step.schedule import Group, where


class Refined(ScheduleFree):
    """A base class that stands before the class of an optimizer."""

    def __init__(self, *args: Any, refined_c: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.defaults["refined_c"] = _arguments.check("refined_c", refined_c)
        for group in self.param_groups:
            group.setdefault("refined_c", self.defaults["refined_c"])

    def _weight(self, group: Group, lr: float) -> float:
        plain = super()._weight(group, lr)
        weight = (1 - self._beta(group)) * group["refined_c"] * plain
        return where(weight < 1, weight, 1.0)


class SGDScheduleFreeRefined(Refined, SGDScheduleFree):
    """:class:`SGDScheduleFree` with ``refined_c``, the decoupling constant C."""


class AdamWScheduleFreeRefined(Refined, AdamWScheduleFree):
    r""":class:`AdamWScheduleFree` with ``refined_c``, the decoupling constant C.

    .. math::

        c_k = \min(1, (1 - \beta) \, C \, w_k / W_k)

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.AdamWScheduleFreeRefined([w], lr=0.1, refined_c=50.0)
      >>> optimizer.train()
      >>> for _ in range(200):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True
    """


class RAdamScheduleFreeRefined(Refined, RAdamScheduleFree):
    """:class:`RAdamScheduleFree` with ``refined_c``, the decoupling constant C."""


class ScheduleFreeWrapperRefined(Refined, ScheduleFreeWrapper):
    """:class:`ScheduleFreeWrapper` with ``refined_c``, the decoupling constant C."""
