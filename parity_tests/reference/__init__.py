r"""The float64 reference: x, y and z all stored, the formulas as they are written.

.. math::

    z' &= z + u \\
    x' &= (1 - c) x + c z' \\
    y' &= (1 - \beta) z' + \beta x'

:class:`ScheduleFree` is this rule and nothing else. An optimizer is a choice for its
four seams (:class:`Seams`): the step size ``lr_k``, the base step ``u``, the
averaging weight ``c`` and the interpolation ``β``. A seam is any callable; one that
remembers something (moments, sums) is a small class.

It is written for being read beside the papers: no care for speed, memory, or
anything that float64 makes unnecessary.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  Liu et al., *On the Variance of the Adaptive Learning Rate and Beyond* (RAdam),
  https://arxiv.org/abs/1908.03265
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

Leaves = dict[str, np.ndarray]  # by name, float64 or complex128


class Now(NamedTuple):
    """What a seam may look at: one group's leaves before step k."""

    k: int  # 0 at the first step
    grads: Leaves  # of those leaves of the group that have one
    x: Leaves
    y: Leaves
    z: Leaves
    value: float | None  # the loss at y, where the caller knows it
    groups: Sequence["Now"]  # this and all the others, for sums over everything

    def total(self, term: Callable[["Now", str], float]) -> float:
        """The sum of ``term(now, leaf)`` over all leaves with a gradient."""
        return float(sum(term(now, leaf) for now in self.groups for leaf in now.grads))


class Seams(NamedTuple):
    """An optimizer. In the order in which a step asks them."""

    b1: Callable[[int], float]  # k -> β
    step_size: Callable[[Now], float]  # -> lr_k
    base: Callable[[Now, float], Leaves]  # now, lr_k -> u, which contains -lr_k
    average: Callable[[int, float], float]  # k, lr_k -> c


class ScheduleFree:
    """The rule, over named leaves in groups of their own seams.

    x and z of a leaf without a gradient stay where they are; its y lies between them
    as β says, like any other. One counter serves every group and seam.

    Args:
      params: the initial weights by name.
      groups: (names, seams), for every group. Seams keep state, so each group and
        each run needs its own.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        groups: Sequence[tuple[Collection[str], Seams]],
    ) -> None:
        self.y = {name: _wide(leaf) for name, leaf in params.items()}
        self.x, self.z = dict(self.y), dict(self.y)
        self.groups = groups
        self.k = 0

    def step(
        self, grads: Mapping[str, np.ndarray | None], value: float | None = None
    ) -> None:
        nows: list[Now] = []
        for names, _ in self.groups:
            given = {n: _wide(g) for n in names if (g := grads.get(n)) is not None}
            x, y, z = ({n: at[n] for n in names} for at in (self.x, self.y, self.z))
            nows.append(Now(self.k, given, x, y, z, value, nows))
        for (_, seams), now in zip(self.groups, nows, strict=True):
            b1 = seams.b1(self.k)
            lr = seams.step_size(now)
            u = seams.base(now, lr)
            c = seams.average(self.k, lr)
            for n in now.y:
                if n in u:
                    self.z[n] = self.z[n] + u[n]
                    self.x[n] = (1 - c) * self.x[n] + c * self.z[n]
                self.y[n] = (1 - b1) * self.z[n] + b1 * self.x[n]
        self.k += 1


# Step sizes


def warmup(lr: Callable[[int], float], warmup_steps: int) -> Callable[[Now], float]:
    """lr_k = lr · min(1, (k+1) / warmup_steps)"""
    return lambda now: lr(now.k) * min(1.0, (now.k + 1) / max(1, warmup_steps))


def paper_step_size(
    step_size: Callable[[Now], float], b2: float
) -> Callable[[Now], float]:
    """AdamW's paper variant: lr_k also times sqrt(1 - b2^(k+1))."""
    return lambda now: step_size(now) * sqrt(1 - b2 ** (now.k + 1))


def at_least(step_size: Callable[[Now], float], eps: float) -> Callable[[Now], float]:
    """The AlgoPerf variant: lr_k is at least eps."""
    return lambda now: max(step_size(now), eps)


def rho(b2: float, t: int) -> tuple[float, float]:
    """RAdam's (ρ, ρ∞)."""
    rho_inf = 2 / (1 - b2) - 1
    return rho_inf - 2 * t * b2**t / (1 - b2**t), rho_inf


def rectified(
    lr: Callable[[int], float], b2: float, silent_sgd_phase: bool
) -> Callable[[Now], float]:
    """RAdam's lr_k."""

    def step_size(now: Now) -> float:
        p, p_inf = rho(b2, now.k + 1)
        if p > 4:
            factor = ((p - 4) * (p - 2) * p_inf) / ((p_inf - 4) * (p_inf - 2) * p)
            return lr(now.k) * sqrt(factor)
        return 0.0 if silent_sgd_phase else lr(now.k)

    return step_size


# Averaging weights


class PolynomialAverage:
    """c = w / W with w = (k+1)^r · lr_max^weight_lr_power; 0 while W = 0."""

    def __init__(self, r: float = 0.0, weight_lr_power: float = 2.0) -> None:
        self.r, self.weight_lr_power = r, weight_lr_power
        self.lr_max = self.weight_sum = 0.0

    def __call__(self, k: int, lr: float) -> float:
        self.lr_max = max(self.lr_max, lr)
        w = (k + 1) ** self.r * self.lr_max**self.weight_lr_power
        self.weight_sum += w
        return w / self.weight_sum if self.weight_sum > 0 else 0.0


# Base steps


class SGD:
    """u = -lr_k (g + λ p); with momentum μ, b = μ b + g (at first g) instead of g.

    p is y, z or x, as ``decay_at`` says.
    """

    def __init__(
        self, weight_decay: float = 0.0, decay_at: str = "y", momentum: float = 0.0
    ) -> None:
        self.weight_decay, self.decay_at = weight_decay, decay_at
        self.momentum, self.b = momentum, Leaves()

    def __call__(self, now: Now, lr: float) -> Leaves:
        u = Leaves()
        for n, g in now.grads.items():
            self.b[n] = self.momentum * self.b.get(n, 0.0) + g
            p = getattr(now, self.decay_at)[n]
            u[n] = -lr * (self.b[n] + self.weight_decay * p)
        return u


class AdamW:
    """u = -lr_k (ĝ / (sqrt(v / (1 - b2^t)) + eps) + λ p)

    with v = b2 v + (1 - b2) |g|², and ĝ = g or, with inner momentum b,
    m = b m + (1 - b) g and ĝ = m / (1 - b^t). t counts the gradients that the leaf has
    had: k + 1 where it never missed one, as in torch.optim. ``counts_apart = False``
    makes t = k + 1 for all, as in Meta's package.

    ``variant="paper"`` has sqrt(v) + eps in the denominator; ``"algoperf"`` has that,
    and its steps (not its averaging weights) are times sqrt(1 - b2^t).
    """

    def __init__(
        self,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_at: str = "y",
        inner_momentum: float = 0.0,
        variant: str = "standard",
    ) -> None:
        self.b2, self.eps, self.inner_momentum = b2, eps, inner_momentum
        self.weight_decay, self.decay_at = weight_decay, decay_at
        self.variant = variant
        self.v, self.m = Leaves(), Leaves()
        self.counts_apart = True
        self.t: dict[str, int] = {}  # gradients that each leaf has had

    def direction(self, n: str, g: np.ndarray, k: int) -> np.ndarray:
        b2, b = self.b2, self.inner_momentum
        self.t[n] = self.t.get(n, 0) + 1 if self.counts_apart else k + 1
        t = self.t[n]
        self.v[n] = b2 * self.v.get(n, 0.0) + (1 - b2) * np.abs(g) ** 2
        self.m[n] = b * self.m.get(n, 0.0) + (1 - b) * g
        numerator = self.m[n] / (1 - b**t)
        correction = 1 - b2**t if self.variant == "standard" else 1.0
        return numerator / (np.sqrt(self.v[n] / correction) + self.eps)

    def __call__(self, now: Now, lr: float) -> Leaves:
        if self.variant == "paper":  # whose lr_k has the correction of step k
            lr = lr / sqrt(1 - self.b2 ** (now.k + 1))
        u = Leaves()
        for n, g in now.grads.items():
            p = getattr(now, self.decay_at)[n]
            u[n] = -lr * (self.direction(n, g, now.k) + self.weight_decay * p)
            if self.variant != "standard":
                u[n] = u[n] * sqrt(1 - self.b2 ** self.t[n])
        return u


class RAdam(AdamW):
    """AdamW where ρ > 4, the plain gradient before."""

    def direction(self, n: str, g: np.ndarray, k: int) -> np.ndarray:
        adam = super().direction(n, g, k)
        return adam if rho(self.b2, k + 1)[0] > 4 else g


def _wide(leaf: np.ndarray) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
