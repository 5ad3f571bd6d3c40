"""Base steps: the displacement u of z, from the gradients and lr_k.

Prodigy and Muon have files of their own.
"""

from math import sqrt

import ml_dtypes
import numpy as np

from parity_tests.reference.rule import Leaves, Now
from parity_tests.reference.step_sizes import rho


class SGD:
    """u = -lr_k (b + λ p), with the momentum buffer b = μ b + g.

    b is g at the first gradient. p is y, z or x, as ``decay_at`` says.
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

    with v = b2 v + (1 - b2) |g|², m = b m + (1 - b) g and ĝ = m / (1 - b^t), where b is
    the inner momentum; b = 0 makes ĝ = g. p is y, z or x, as ``decay_at`` says. t
    counts the gradients that the leaf has had, as in torch.optim: k + 1 for a leaf that
    had one at every step. ``counts_apart = False`` makes t = k + 1 for every leaf, as
    in Meta's package.

    The variants "paper" and "algoperf" divide by sqrt(v) + eps and multiply the whole
    step, decay included, by sqrt(1 - b2^t) instead.
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
        b = self.inner_momentum
        self.t[n] = self.t.get(n, 0) + 1 if self.counts_apart else k + 1
        t = self.t[n]
        self.m[n] = b * self.m.get(n, 0.0) + (1 - b) * g
        return self.m[n] / (1 - b**t) / self.denominator(n, g, t)

    def denominator(self, n: str, g: np.ndarray, t: int) -> np.ndarray:
        b2 = self.b2
        self.v[n] = b2 * self.v.get(n, 0.0) + (1 - b2) * np.abs(g) ** 2
        correction = 1 - b2**t if self.variant == "standard" else 1.0
        return np.sqrt(self.v[n] / correction) + self.eps

    def __call__(self, now: Now, lr: float) -> Leaves:
        if self.variant == "paper":
            # Its lr_k already holds the correction of step k; each leaf has its own.
            lr = lr / sqrt(1 - self.b2 ** (now.k + 1))
        u = Leaves()
        for n, g in now.grads.items():
            p = getattr(now, self.decay_at)[n]
            u[n] = -lr * (self.direction(n, g, now.k) + self.weight_decay * p)
            if self.variant != "standard":
                u[n] = u[n] * sqrt(1 - self.b2 ** self.t[n])
        return u


class InPlaceAdamW(AdamW):
    """AdamW's AlgoPerf variants with a v in bfloat16 that is moved in place.

    Each operation computes in float32 and is rounded to nearest, R, when it is stored:

    v = R(R(b2 v) + (1 - b2) g²),  denominator R(R(sqrt(v)) + eps)

    This is how PyTorch computes ``v.mul_(b2).addcmul_(g, g, value=1 - b2)`` and
    ``v.sqrt().add_(eps)``. A float64 sum would now and then fall to the other side of a
    tie, and the trajectory with it; so this one formula is in float32.
    """

    def denominator(self, n: str, g: np.ndarray, t: int) -> np.ndarray:
        b2, share, eps = map(np.float32, (self.b2, 1 - self.b2, self.eps))
        v = self.v.get(n, np.zeros_like(g)).astype(np.float32)
        v = to_nearest_bfloat16(b2 * v)
        self.v[n] = to_nearest_bfloat16(v + share * np.square(g.astype(np.float32)))
        return to_nearest_bfloat16(to_nearest_bfloat16(np.sqrt(self.v[n])) + eps)


def to_nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, still in float32."""
    return np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float32)


class RAdam(AdamW):
    """AdamW's direction where ρ > 4, and the plain gradient before that."""

    def direction(self, n: str, g: np.ndarray, k: int) -> np.ndarray:
        adam = super().direction(n, g, k)
        return adam if rho(self.b2, k + 1)[0] > 4 else g


class AdamC(AdamW):
    """ScheduleFree+'s AdamW, whose decay is times lr_k²:

    u = -lr_k ĝ / (sqrt(v / (1 - b2^t)) + eps) - lr_k² λ y
    """

    def __call__(self, now: Now, lr: float) -> Leaves:
        return {
            n: -lr * self.direction(n, g, now.k) - lr**2 * self.weight_decay * now.y[n]
            for n, g in now.grads.items()
        }
