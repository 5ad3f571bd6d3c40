r"""The float64 reference of what came after the first paper, over the same seams.

ScheduleFree+ takes the loss f at y, and sums over all leaves of all groups:

.. math::

    I &= \beta_k \sum g \cdot (z - x) \\
    e &= p e + (1 - p) \sqrt{\pi/2} \sum |g|, \quad \hat e = e / (1 - p^{k+1}) \\
    lr_k &= \max(lr, \epsilon) \max(0, f + I) / \hat e

References:
  Defazio, *ScheduleFree+*, https://arxiv.org/abs/2605.19095
  Song et al., *Through the River*, https://arxiv.org/abs/2507.09846 (Refined)
  Defazio et al., *Smoothing DiLoCo with Primal Averaging*,
    https://arxiv.org/abs/2512.17131 (GPA)
  Mishchenko and Defazio, *Prodigy*, https://arxiv.org/abs/2306.06101
  Jordan et al., *Muon*, https://kellerjordan.github.io/posts/muon
  Liu et al., *Muon is Scalable for LLM Training*, https://arxiv.org/abs/2502.16982
  Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
  Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
    https://arxiv.org/abs/2605.23061 (NorMuon in it)
  Kim et al., *AMUSE*, https://arxiv.org/abs/2605.22432 (the growing β)
"""

from collections.abc import Callable, Mapping
from math import exp, log, pi, sqrt

import numpy as np

from parity_tests.reference import AdamW, Leaves, Now, ScheduleFree

Weight = Callable[[int, float], float]  # k, lr_k -> c


# ScheduleFree+


def annealed(start: float, end: float, steps: int) -> Callable[[int], float]:
    """1 - β_k = exp((1 - s) log(1 - start) + s log(1 - end)), s = min(k / steps, 1)"""

    def b1(k: int) -> float:
        s = min(k / steps, 1.0) if steps else 0.0
        return 1 - exp((1 - s) * log(1 - start) + s * log(1 - end))

    return b1


class PolyakStep:
    """lr_k; 0 where there is no gradient, since then there is no direction either."""

    def __init__(
        self,
        lr: Callable[[int], float],
        eps: float,
        b1: Callable[[int], float],
        polyak_beta: float,
        upstream_compatible: bool,
    ) -> None:
        self.lr, self.eps, self.b1 = lr, eps, b1
        self.polyak_beta, self.upstream = polyak_beta, upstream_compatible
        self.e = 0.0

    def __call__(self, now: Now) -> float:
        p = self.polyak_beta

        def inner(now: Now, n: str) -> float:
            return np.sum(np.real(np.conj(now.grads[n]) * (now.z[n] - now.x[n])))

        norm = sqrt(pi / 2) * now.total(lambda now, n: np.sum(np.abs(now.grads[n])))
        self.e = p * self.e + (1 - p) * norm
        corrected = self.e / (1 - p ** (now.k + 1))
        if self.upstream:
            self.e = corrected
        assert now.value is not None
        gap = now.value + self.b1(now.k) * now.total(inner)
        lr = max(self.lr(now.k), self.eps)
        return lr * max(0.0, gap) / corrected if corrected else 0.0


class AdamC(AdamW):
    """u = -lr_k ĝ / (sqrt(v / (1 - b2^t)) + eps) - lr_k² λ y"""

    def __call__(self, now: Now, lr: float) -> Leaves:
        return {
            n: -lr * self.direction(n, g, now.k) - lr**2 * self.weight_decay * now.y[n]
            for n, g in now.grads.items()
        }


class AverageAfter:
    """c = 1 for the first c_warmup steps, which add no weight."""

    def __init__(self, c_warmup: int, average: Weight) -> None:
        self.c_warmup, self.average = c_warmup, average

    def __call__(self, k: int, lr: float) -> float:
        if k >= self.c_warmup:
            return self.average(k, lr)
        self.average.lr_max = max(self.average.lr_max, lr)  # type: ignore[attr-defined]
        return 1.0


# Averaging weights


def refined(average: Weight, b1: Callable[[int], float], c: float) -> Weight:
    """c_k = min(1, (1 - β) C w / W)"""
    return lambda k, lr: min(1.0, (1 - b1(k)) * c * average(k, lr))


def exponential(mu_x: float) -> Weight:
    """GPA's c = 1 - μ_x."""
    return lambda k, lr: 1 - mu_x


# Prodigy


class Prodigy:
    """With the step dlr = d lr_k sqrt(1 - b2^(k+1)) / (1 - b1^(k+1)) and b3 = sqrt(b2),

    m  = b1 m + (1 - b1) d g,            v = b2 v + (1 - b2) (d g)²
    r  = b3 r + (d/d0) dlr Σ g·(z0 - z)
    s  = b3 s + (d/d0) dlr g,            d' = max(d, r / Σ|s|)
    u  = -dlr (m / (sqrt(v) + d' eps) + λ z)
    """

    def __init__(
        self, b1: float, b2: float, eps: float, weight_decay: float, d0: float
    ) -> None:
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.d0 = self.d = d0
        self.r = 0.0
        self.z0, self.m, self.v, self.s = Leaves(), Leaves(), Leaves(), Leaves()

    def __call__(self, now: Now, lr: float) -> Leaves:
        b1, b2, d, t = self.b1, self.b2, self.d, now.k + 1
        self.z0 = self.z0 or dict(now.z)
        dlr = d * lr * sqrt(1 - b2**t) / (1 - b1**t)
        scale = d / self.d0 * dlr
        for n, g in now.grads.items():
            self.m[n] = b1 * self.m.get(n, 0.0) + (1 - b1) * d * g
            self.v[n] = b2 * self.v.get(n, 0.0) + (1 - b2) * (d * g) ** 2
            self.s[n] = sqrt(b2) * self.s.get(n, 0.0) + scale * g
        distance = sum(
            np.sum(g * (self.z0[n] - now.z[n])) for n, g in now.grads.items()
        )
        self.r = sqrt(b2) * self.r + scale * distance
        self.d = max(d, self.r / sum(np.sum(np.abs(s)) for s in self.s.values()))
        return {
            n: -dlr
            * (
                self.m[n] / (np.sqrt(self.v[n]) + self.d * self.eps)
                + self.weight_decay * now.z[n]
            )
            for n in now.grads
        }


def weighed_by_d(average: Weight, prodigy: Prodigy) -> Weight:
    """The average sees lr_k d, with the d that the step has found."""
    return lambda k, lr: average(k, lr * prodigy.d)


# Muon


def growing(b1: float, steps: int, rho: float) -> Callable[[int], float]:
    """1 - β_t = (1 - b1) ((steps - 1) / (t - 1))^rho after ``steps`` steps

    where t = 1 at the first gradient; step k forms the y of gradient t = k + 2.
    """
    return lambda k: 1 - (1 - b1) * min(1.0, (steps - 1) / (k + 1)) ** rho


def orthogonalised(m: np.ndarray, eps: float) -> np.ndarray:
    """X / (|X| + eps), and 5 times a X + b (X Xᵀ) X + c (X Xᵀ)² X"""
    x = m / (np.linalg.norm(m) + eps)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


class Muon(AdamW):
    """Of matrices u = -lr_k (D + λ p), of the rest AdamW's without momentum.

    m = μ m + (1 - μ) g,  P = orthogonalised m, which is with Nesterov
    μ m / (1 - μ^(k+2)) + (1 - μ) g / (1 - μ^(k+1)) instead, and

    D = 0.2 sqrt(max(rows, columns)) P,  or with ``row_b2``, where a row is what enters
    one output neuron,

    v = row_b2 v + (1 - row_b2) mean of P² by row,  P̂ = P / (sqrt(v) + eps),
    D = 0.2 sqrt(rows columns) P̂ / |P̂|
    """

    def __init__(
        self,
        b2: float,
        eps: float,
        weight_decay: float,
        decay_at: str,
        momentum: float,
        nesterov: bool,
        row_b2: float | None,
    ) -> None:
        super().__init__(b2, eps, weight_decay, decay_at)
        self.momentum, self.nesterov, self.row_b2 = momentum, nesterov, row_b2

    def direction(self, n: str, g: np.ndarray, k: int) -> np.ndarray:
        if g.ndim != 2:
            return super().direction(n, g, k)
        mu, b2 = self.momentum, self.row_b2
        m = self.m[n] = mu * self.m.get(n, 0.0) + (1 - mu) * g
        if self.nesterov:
            m = mu * m / (1 - mu ** (k + 2)) + (1 - mu) * g / (1 - mu ** (k + 1))
        p = orthogonalised(m, self.eps)
        if b2 is None:
            return 0.2 * sqrt(max(p.shape)) * p
        mean = np.mean(p**2, axis=1, keepdims=True)
        self.v[n] = b2 * self.v.get(n, 0.0) + (1 - b2) * mean
        p = p / (np.sqrt(self.v[n]) + self.eps)
        return 0.2 * sqrt(p.size) * p / np.linalg.norm(p)


# GPA's published code


class HeldDecay(ScheduleFree):
    """Decay that shrinks z (or y) and leaves y (or z): x is then what they imply."""

    def __init__(self, *args: object, shrink: float, at: str, b1: float) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.shrink, self.at, self.b1 = shrink, at, b1

    def step(
        self, grads: Mapping[str, np.ndarray | None], value: float | None = None
    ) -> None:
        leaves = self.z if self.at == "z" else self.y
        for n in leaves:
            leaves[n] = (1 - self.shrink) * leaves[n]
            self.x[n] = (self.y[n] - (1 - self.b1) * self.z[n]) / self.b1
        super().step(grads, value)
