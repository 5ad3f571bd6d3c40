"""The scalars of a step, in double precision: step size, bias correction, weight.

    lr_k   = lr * min(1, (k + 1) / warmup_steps)
    lr_max = max(lr_max, lr_k)
    w_k    = (k + 1)^r * lr_max^weight_lr_power
    W_k    = W_{k-1} + w_k
    c_k    = w_k / W_k, and 0 while W_k = 0

k counts the steps taken, 0 at the first; base step and average share it. All of it
lives in the parameter group as Python numbers, whatever the parameters' dtype.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import math
from typing import Any

Group = dict[str, Any]


def warmed_up(lr: float, k: int, warmup_steps: int) -> float:
    """The step size of step k under linear warmup."""
    return lr * (k + 1) / warmup_steps if k + 1 < warmup_steps else lr


def polynomial_weight(
    group: Group, lr: float, r: float, weight_lr_power: float
) -> float:
    """Enters step k's weight into the group's sum; returns c_k."""
    lr_max = group["lr_max"] = max(lr, group["lr_max"])
    weight = (group["k"] + 1) ** r * lr_max**weight_lr_power
    weight_sum = group["weight_sum"] = group["weight_sum"] + weight
    return weight / weight_sum if weight_sum > 0 else 0.0


def one_minus_power(b: float, k: int) -> float:
    """``1 - b^(k + 1)``, the bias correction, without cancellation."""
    return -math.expm1((k + 1) * math.log(b)) if b > 0 else 1.0


def rectification(b2: float, k: int) -> float | None:
    """RAdam's factor on the step size; None while v stands for too few gradients."""
    t = k + 1
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / one_minus_power(b2, k)
    if rho <= 4:
        return None
    numerator = (rho - 4) * (rho - 2) * rho_inf
    return math.sqrt(numerator / ((rho_inf - 4) * (rho_inf - 2) * rho))
