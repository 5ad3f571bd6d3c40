"""Schedule-Free SGD: ``z' = z - lr_k (g + λ p)``, p one of y, z, x.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from sf_torch._optimizer import ScheduleFree, bookkeeping
from sf_torch._optimizers.forms import Closure, Reference
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group


class SGDScheduleFree(ScheduleFree):
    r"""Schedule-Free SGD.

    .. math::

        lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
        z' &= z - lr_k (g + \lambda p) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    with p the iterate that ``decay_at`` names.

    Args:
      params: parameters or groups of them, as for any torch optimizer.
      lr: step size; good values are 10 to 50 times those of SGD with a schedule.
      momentum: β, the weight of x in y, in [0, 1]. It takes the place of momentum.
      weight_decay: λ, decoupled and times the learning rate.
      warmup_steps: steps of linear warmup.
      r: steps are weighed by ``(k + 1) ** r``.
      weight_lr_power: and by the largest learning rate so far to this power.
      foreach: False for one parameter at a time, else as many as pay.
      decay_at: "y", "z" or "x": what the decay pulls towards zero by.
      store_x: keep x in the state.
      state_dtype: dtype of the state. By default that of each parameter, float32 for
        those narrower than it.
      fused: one kernel for the whole step (CUDA, with Triton); None where it works.
      capturable: counters on the device, for CUDA graphs; needs ``fused``. An ``lr``
        that is to change between replays must be a tensor there.
      rounding: "nearest", or "stochastic" for bfloat16 arrays, with
        ``state_dtype=torch.bfloat16``: y (of bfloat16 parameters), z and x. Rounded at
        random, small steps are not lost. The random bits depend on ``seed``, the
        group's k and the places of parameter and element. Slow: it is the plain
        formula, neither ``fused`` nor compiled.
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
      >>> optimizer = sf_torch.SGDScheduleFree([w], lr=0.5, warmup_steps=10)
      >>> optimizer.train()
      >>> for _ in range(100):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> optimizer.eval()
      >>> bool(w.norm() < 0.2)
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        decay_at: str = "y",
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "foreach": foreach,
            "decay_at": decay_at,
        }
        super().__init__(
            params,
            options
            | bookkeeping(
                store_x, state_dtype, fused, capturable, rounding, seed, skip_nonfinite
            ),
        )

    def _beta(self, group: Group) -> float:
        return group["momentum"]

    def _base_numbers(self, group: Group, lr: float, k: Any) -> Numbers:
        decay = float(group["weight_decay"])
        return Numbers(lr, lr * decay, decay_at=group["decay_at"] if decay else "")


class SGDScheduleFreeReference(Reference, SGDScheduleFree):
    """:class:`SGDScheduleFree` with x, y and z all stored.

    Begins in train mode, as Meta's class of this name does.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.train()


class SGDScheduleFreeClosure(Closure, SGDScheduleFree):
    """:class:`SGDScheduleFree` for ``step(closure)``, without modes to switch."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        weight_decay: float = 0,
        momentum: float = 0.9,
        *args: Any,
        **options: Any,
    ) -> None:
        # The order of the arguments is that of Meta's class of this name.
        super().__init__(params, lr, momentum, weight_decay, *args, **options)
