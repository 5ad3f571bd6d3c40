"""Prodigy: AdamW that estimates its own step size d.

References:
  Mishchenko and Defazio, *Prodigy*, https://arxiv.org/abs/2306.06101
"""

from math import sqrt

import numpy as np

from parity_tests.reference.averaging import Weight
from parity_tests.reference.rule import Leaves, Now


class Prodigy:
    """Prodigy's base step, with its estimate d of the distance to the solution.

    dlr = d lr_k sqrt(1 - b2^(k+1)) / (1 - b1^(k+1)),   b3 = sqrt(b2)
    m  = b1 m + (1 - b1) d g,            v = b2 v + (1 - b2) (d g)²
    r  = b3 r + (d/d0) dlr Σ g·(z0 - z)
    s  = b3 s + (d/d0) dlr g,            d' = max(d, r / Σ|s|)
    u  = -dlr (m / (sqrt(v) + d' eps) + λ z)

    z0 is the z of the first step. ``b3`` may be given. With ``safeguard`` s grows by
    d in place of dlr, so that warmup does not make it small.
    """

    def __init__(
        self,
        b1: float,
        b2: float,
        eps: float,
        weight_decay: float,
        d0: float,
        b3: float | None = None,
        safeguard: bool = False,
    ) -> None:
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.b3 = sqrt(b2) if b3 is None else b3
        self.safeguard = safeguard
        self.d0 = self.d = d0
        self.r = 0.0
        self.z0, self.m, self.v, self.s = Leaves(), Leaves(), Leaves(), Leaves()

    def __call__(self, now: Now, lr: float) -> Leaves:
        b1, b2, d, t = self.b1, self.b2, self.d, now.k + 1
        self.z0 = self.z0 or dict(now.z)
        dlr = d * lr * sqrt(1 - b2**t) / (1 - b1**t)
        in_s = d / self.d0 * (d if self.safeguard else dlr)
        for n, g in now.grads.items():
            self.m[n] = b1 * self.m.get(n, 0.0) + (1 - b1) * d * g
            self.v[n] = b2 * self.v.get(n, 0.0) + (1 - b2) * (d * g) ** 2
            self.s[n] = self.b3 * self.s.get(n, 0.0) + in_s * g
        distance = sum(
            np.sum(g * (self.z0[n] - now.z[n])) for n, g in now.grads.items()
        )
        self.r = self.b3 * self.r + d / self.d0 * dlr * distance
        self.d = max(d, self.r / sum(np.sum(np.abs(s)) for s in self.s.values()))
        return {
            n: -dlr
            * (
                self.m[n] / (np.sqrt(self.v[n]) + self.d * self.eps)
                + self.weight_decay * now.z[n]
            )
            for n in now.grads
        }


class AlgoPerfProdigy(Prodigy):
    """Prodigy as Meta entered it into AlgoPerf, with Schedule-Free averaging.

    v  = b2 v + (1 - b2) (d g)²
    r  = b3 r + (d/d0) d lr_k Σ g·(z0 - z)
    s  = b3 s + (d/d0) d lr_k g,         d' = max(d, r / Σ|s|)
    u  = -d lr_k (d' g / (sqrt(v) + d' eps) + λ x)

    The entry has the sums without 1/d0, which leaves d' as it is, and keeps v, s and z0
    in bfloat16. Its averaging weight is (k + 1)^0.75, whatever lr_k and d are.

    References:
      facebookresearch/schedule_free, ``schedulefree/algoperf/external_tuning/``
        ``schedule_free_prodigy/submission.py``
    """

    def __call__(self, now: Now, lr: float) -> Leaves:
        self.z0 = self.z0 or dict(now.z)
        d, dlr = self.d, self.d * lr
        for n, g in now.grads.items():
            self.v[n] = self.b2 * self.v.get(n, 0.0) + (1 - self.b2) * (d * g) ** 2
            self.s[n] = self.b3 * self.s.get(n, 0.0) + d / self.d0 * dlr * g
        distance = sum(
            np.sum(g * (self.z0[n] - now.z[n])) for n, g in now.grads.items()
        )
        self.r = self.b3 * self.r + d / self.d0 * dlr * distance
        self.d = max(d, self.r / sum(np.sum(np.abs(s)) for s in self.s.values()))
        return {
            n: -dlr
            * (
                self.d * g / (np.sqrt(self.v[n]) + self.d * self.eps)
                + self.weight_decay * now.x[n]
            )
            for n, g in now.grads.items()
        }


def weighed_by_d(average: Weight, prodigy: Prodigy) -> Weight:
    """Gives ``average`` the step size lr_k d, with the d after this step's update."""
    return lambda k, lr: average(k, lr * prodigy.d)
