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

    z0 is the z of the first step.
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
    """Gives ``average`` the step size lr_k d, with the d after this step's update."""
    return lambda k, lr: average(k, lr * prodigy.d)
