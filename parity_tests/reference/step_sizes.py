"""Step sizes: lr_k from lr and the step k, and for ScheduleFree+ from the loss.

All but :func:`rho` make the ``step_size`` of a :class:`Seams`.

References:
  Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond* (RAdam),
    https://arxiv.org/abs/1908.03265
  Defazio, *ScheduleFree+*, https://arxiv.org/abs/2605.19095
"""

from collections.abc import Callable
from math import isfinite, pi, sqrt

import numpy as np

from parity_tests.reference.rule import Now


def warmup(lr: Callable[[int], float], warmup_steps: int) -> Callable[[Now], float]:
    """lr_k = lr · min(1, (k+1) / warmup_steps)"""
    return lambda now: lr(now.k) * min(1.0, (now.k + 1) / max(1, warmup_steps))


def paper_step_size(
    step_size: Callable[[Now], float], b2: float
) -> Callable[[Now], float]:
    """The paper variant of AdamW multiplies lr_k by sqrt(1 - b2^(k+1))."""
    return lambda now: step_size(now) * sqrt(1 - b2 ** (now.k + 1))


def at_least(step_size: Callable[[Now], float], eps: float) -> Callable[[Now], float]:
    """The AlgoPerf variant of AdamW raises lr_k to eps where it is smaller."""
    return lambda now: max(step_size(now), eps)


def rho(b2: float, t: int) -> tuple[float, float]:
    """RAdam's ρ_t and ρ∞: the lengths of its approximate moving average."""
    rho_inf = 2 / (1 - b2) - 1
    return rho_inf - 2 * t * b2**t / (1 - b2**t), rho_inf


def rectified(
    lr: Callable[[int], float], b2: float, silent_sgd_phase: bool
) -> Callable[[Now], float]:
    """RAdam's lr_k: lr times the rectification where ρ > 4.

    Before that lr_k is 0, or lr where ``silent_sgd_phase`` is False.
    """

    def step_size(now: Now) -> float:
        p, p_inf = rho(b2, now.k + 1)
        if p > 4:
            factor = ((p - 4) * (p - 2) * p_inf) / ((p_inf - 4) * (p_inf - 2) * p)
            return lr(now.k) * sqrt(factor)
        return 0.0 if silent_sgd_phase else lr(now.k)

    return step_size


class PolyakStep:
    r"""The Polyak step of ScheduleFree+, from the loss f at y.

    .. math::

        I &= \beta_k \sum g \cdot (z - x) \\
        e &= p e + (1 - p) \sqrt{\pi/2} \sum |g|, \quad \hat e = e / (1 - p^{k+1}) \\
        lr_k &= \max(lr, \epsilon) \max(0, f - f_{low} + I) / \hat e

    The sums are over the leaves of all groups, with g as it was before it was clipped
    by one factor, where its norm is given. lr_k is 0 where every gradient is 0,
    and where the loss is not finite.

    Args:
      polyak_beta: p.
      upstream_compatible: keep ê in place of e, as the published code does.
      loss_floor: f_low by step, the least loss that is thought possible.
    """

    def __init__(
        self,
        lr: Callable[[int], float],
        eps: float,
        b1: Callable[[int], float],
        polyak_beta: float,
        upstream_compatible: bool,
        loss_floor: Callable[[int], float] = lambda k: 0.0,
    ) -> None:
        self.lr, self.eps, self.b1 = lr, eps, b1
        self.polyak_beta, self.upstream = polyak_beta, upstream_compatible
        self.loss_floor = loss_floor
        self.e = 0.0

    def __call__(self, now: Now) -> float:
        p = self.polyak_beta

        def inner(now: Now, n: str) -> float:
            return np.sum(np.real(np.conj(now.grads[n]) * (now.z[n] - now.x[n])))

        clipped = 1.0  # the factor that the gradients were multiplied by
        if now.grad_norm is not None:
            square = now.total(lambda now, n: np.sum(np.abs(now.grads[n]) ** 2))
            clipped = sqrt(square) / now.grad_norm
        norm = now.total(lambda now, n: np.sum(np.abs(now.grads[n])))
        norm = sqrt(pi / 2) * norm / clipped
        self.e = p * self.e + (1 - p) * norm
        corrected = self.e / (1 - p ** (now.k + 1))
        if self.upstream:
            self.e = corrected
        assert now.value is not None
        gap = now.value - self.loss_floor(now.k)
        gap += self.b1(now.k) * now.total(inner) / clipped
        lr = max(self.lr(now.k), self.eps)
        if not corrected or not isfinite(gap):
            return 0.0
        return lr * max(0.0, gap) / corrected
