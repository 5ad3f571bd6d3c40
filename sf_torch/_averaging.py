r"""The scalars of a step: its size, its bias corrections and its averaging weight.

.. math::

    lr_k &= lr \cdot \min(1, (k+1) / warmup\_steps) \\
    lr_{max} &= \max(lr_{max}, lr_k) \\
    w_k &= (k+1)^r \, lr_{max}^{weight\_lr\_power} \\
    W_k &= W_{k-1} + w_k \\
    c_k &= w_k / W_k \quad\text{(0 while } W_k = 0\text{)}

One counter ``k`` serves the base step and the average; it is 0 at the first step.
All of it is Python's double precision, whatever the parameters are.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

import math
from typing import Any


def warmed_up(lr: float, k: int, warmup_steps: int) -> float:
    """``lr_k``: the step size of step k, with the linear warmup in front."""
    return lr * (k + 1) / warmup_steps if k < warmup_steps else lr


def averaging_weight(
    group: dict[str, Any], lr: float, r: float, weight_lr_power: float
) -> float:
    """``c_k`` for a step of size lr; ``lr_max`` and ``weight_sum`` move on."""
    group["scheduled_lr"] = lr
    lr_max = group["lr_max"] = max(lr, float(group["lr_max"]))
    weight = (group["k"] + 1) ** r * lr_max**weight_lr_power
    weight_sum = group["weight_sum"] = float(group["weight_sum"]) + weight
    return weight / weight_sum if weight_sum > 0 else 0.0


def one_minus_power(b: float, t: int) -> float:
    """``1 - b^t``, the bias correction, without cancellation for b close to 1."""
    return -math.expm1(t * math.log(b)) if b > 0 else 1.0


def rectification(b2: float, t: int) -> float | None:
    r"""RAdam's factor on the step size at step t = 1, 2, ...; None while ρ is small.

    .. math::

        \rho_\infty &= 2 / (1 - b_2) - 1 \\
        \rho &= \rho_\infty - 2 t b_2^t / (1 - b_2^t)

    ρ is the length of the average behind v. Up to 4 the variance of Adam's
    direction is not known, and there is no factor.
    """
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / one_minus_power(b2, t)
    if rho <= 4:
        return None
    variance = (rho_inf - 4) * (rho_inf - 2) * rho
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / variance)
