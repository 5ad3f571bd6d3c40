"""The scalars of a step, in double precision: step size, bias correction, weight.

    lr_k   = lr * min(1, (k + 1) / warmup_steps)
    lr_max = max(lr_max, lr_k)
    w_k    = (k + 1)^r * lr_max^weight_lr_power
    W_k    = W_{k-1} + w_k
    c_k    = w_k / W_k, and 0 while W_k = 0

Where a factor of w_k lies beyond 2^±500, W is kept in units of w_k, since neither need
fit into a double: ``weight_sum`` is then W_k / w_k.

k counts the steps taken, 0 at the first; base step and average share it. All of it
lives in the parameter group as Python numbers, whatever the parameters' dtype, or
with ``capturable`` as float64 tensors on the device: the functions take either.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond*,
    https://arxiv.org/abs/1908.03265 (the rectification)
"""

import math
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.numbers import EPS_FLOOR, Numbers

Group = dict[str, Any]
COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")


def to_device(group: Group, device: torch.device) -> None:
    """The counters as tensors, so that a CUDA graph can move them by itself."""
    for key in (*COUNTERS, "lr"):
        if not isinstance(group[key], Tensor) or group[key].device != device:
            group[key] = torch.as_tensor(group[key], dtype=torch.float64).to(device)


def has_begun(group: Group) -> bool:
    """Whether the group has counted a step. Until then x, y and z are one."""
    return isinstance(group["k"], Tensor) or group["k"] > 0


def enter_counters(group: Group, draft: Group, skip: Tensor | None = None) -> None:
    """Makes the counters of a draft the group's own, where ``skip`` is not true."""
    for key, value in draft.items():
        if value is group[key]:
            continue
        if skip is not None and isinstance(value, Tensor):
            value = torch.where(skip.to(value.device), group[key], value)
        if isinstance(group[key], Tensor):
            group[key].copy_(value)
        else:
            group[key] = value


def number(value: Any, keep_tensor: bool) -> Any:
    """value as a Python number, or, for ``capturable``, as the tensor that it is."""
    return value if keep_tensor else float(value)


def warmed_up(lr: Any, k: Any, warmup_steps: int) -> Any:
    """The step size of step k under linear warmup."""
    return lr * _min((k + 1) / warmup_steps, 1.0) if warmup_steps else lr


def polynomial_weight(draft: Group, lr: Any, r: float, weight_lr_power: float) -> Any:
    """Enters step k's weight into a draft's sum; returns c_k."""
    k, lr_max = draft["k"], _max(lr, draft["lr_max"])
    weight, log_unit = _weight(k + 1, lr_max, r, weight_lr_power)
    _, log_unit_before = _weight(_max(k, 1), draft["lr_max"], r, weight_lr_power)
    weight_sum = draft["weight_sum"] * _exp2(log_unit_before - log_unit) + weight
    # Weights that fall, as with r < 0, let it grow without end.
    weight_sum = _min(weight_sum, 1e300)
    draft["lr_max"], draft["weight_sum"] = lr_max, weight_sum
    # Dividing by 1 where the sum is 0: then the weight is 0 as well.
    return weight / where(weight_sum > 0, weight_sum, 1.0)


def _weight(t: Any, lr_max: Any, r: float, weight_lr_power: float) -> tuple[Any, Any]:
    """``t^r lr_max^power`` in units of ``2^log_unit``, and log_unit.

    The unit is 1 where both factors lie within 2^±500, else the weight itself. It
    follows from what the group holds and so need not be remembered.
    """
    log_steps = r * _log2(t)
    # No step has had a weight by lr_max where it is 0 (or -1, at the start).
    log_lr = weight_lr_power * _log2(where(lr_max > 0, lr_max, 1.0))
    fits = _max(abs(log_steps), abs(log_lr)) <= 500
    if not isinstance(fits, Tensor) and not fits:  # such a power of numbers raises
        return 1.0, log_steps + log_lr
    known = where(lr_max > 0, lr_max, 1.0)
    weight = t ** float(r) * known ** float(weight_lr_power)
    if weight_lr_power:
        weight = where(lr_max > 0, weight, 0.0)
    return where(fits, weight, 1.0), where(fits, 0.0, log_steps + log_lr)


def one_minus_power(b: float, k: Any) -> Any:
    """``1 - b^(k + 1)``, the bias correction, without cancellation."""
    return -_expm1((k + 1) * math.log(b)) if b > 0 else 1.0


def adam(
    lr: Any,
    k: Any,
    b: float,
    b2: float,
    eps: float,
    weight_decay: float,
    decay_at: str,
    corrected: bool = True,
) -> Numbers:
    """Adam's step: m and v corrected for their start at 0, or v as it is.

    Args:
      lr: the step size, of the direction and of the decay.
      k: steps that the moments have taken.
      b: decay rate of the first moment; 0 where there is none.
      b2: decay rate of the second.
      eps: added to the root.
      weight_decay: λ.
      decay_at: "y", "z" or "x".
      corrected: whether v is divided by 1 - b2^(k + 1).
    """
    return Numbers(
        lr=lr / one_minus_power(b, k),
        decay=lr * weight_decay,
        m_weight=1 - b,
        v_weight=1 - b2,
        root=one_minus_power(b2, k) ** -0.5 if corrected else 1.0,
        eps=max(eps, EPS_FLOOR),
        decay_at=decay_at if weight_decay else "",
        b2=b2,
        k=k,
    )


def rectification(b2: float, k: Any) -> tuple[Any, Any]:
    """Whether RAdam's step k is rectified, and the factor on its step size if it is."""
    t = k + 1
    rho_inf = 2 / (1 - b2) - 1
    if rho_inf <= 4:  # for b2 up to 0.6, which no step gets beyond
        return False, 0.0
    rho = rho_inf - 2 * t * b2**t / one_minus_power(b2, k)
    known = _max(rho, 4.0)  # below 4 the factor is not defined
    numerator = (known - 4) * (known - 2) * rho_inf
    squared = numerator / ((rho_inf - 4) * (rho_inf - 2) * known)
    return rho > 4, squared**0.5


def where(condition: Any, a: Any, b: Any) -> Any:
    """a or b, by a bool or a tensor of one."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _min(a: Any, b: Any) -> Any:
    return torch.clamp(a, max=b) if isinstance(a, Tensor) else min(a, b)


def _max(a: Any, b: Any) -> Any:
    return torch.clamp(a, min=b) if isinstance(a, Tensor) else max(a, b)


def _log2(a: Any) -> Any:
    return torch.log2(a) if isinstance(a, Tensor) else math.log2(a)


def _exp2(a: Any) -> Any:
    """2^a, cut off below overflow: a is far above 0 only where weights fall."""
    a = _min(a, 1000.0)
    return torch.exp2(a) if isinstance(a, Tensor) else math.exp2(a)


def _expm1(a: Any) -> Any:
    return torch.expm1(a) if isinstance(a, Tensor) else math.expm1(a)
