"""Schedules of β, the weight of x in y, as functions of the step k."""

from collections.abc import Callable
from math import exp, log

from parity_tests.reference.averaging import Weight


def annealed(start: float, end: float, steps: int) -> Callable[[int], float]:
    """ScheduleFree+'s β, whose distance from 1 goes geometrically to that of ``end``.

    1 - β_k = exp((1 - s) log(1 - start) + s log(1 - end)),  s = min(k / steps, 1)

    β_k is ``start`` throughout where ``steps`` is 0.
    """

    def b1(k: int) -> float:
        s = min(k / steps, 1.0) if steps else 0.0
        return 1 - exp((1 - s) * log(1 - start) + s * log(1 - end))

    return b1


def growing(b1: float, steps: int, rho: float) -> Callable[[int], float]:
    """AMUSE's β, which is ``b1`` at first and grows towards 1 after ``steps`` steps.

    1 - β_t = (1 - b1) min(1, (steps - 1) / (t - 1))^rho

    t numbers the gradients from 1. Step k forms the y at which gradient t = k + 2 is
    taken, so it uses β at that t.
    """
    return lambda k: 1 - (1 - b1) * min(1.0, (steps - 1) / (k + 1)) ** rho


class GrowingByWeight:
    """AMUSE's β as its authors' code has it, from the averaging weight c_t.

    S_t = (c_t / (1 - c_t)) (1 - c_T) / c_T
    1 - β_t = (1 - b1) S_t^rho after T = ``steps`` steps of warmup, b1 until then

    with t = k + 1 at the step that forms the y of this β. Without warmup c_t is 1/t and
    S_t is (T - 1) / (t - 1), so that it is :func:`growing`. Give :meth:`average` to the
    rule in place of ``weight``: β is that of the step that was averaged last.

    References:
      https://github.com/kjeiun/amuse, ``src/optim/AMUSE.py``
    """

    def __init__(self, b1: float, steps: int, rho: float, weight: Weight) -> None:
        self.b1, self.steps, self.rho, self.weight = b1, steps, rho, weight
        self.c = self.c_at_end = 1.0

    def average(self, k: int, lr: float) -> float:
        self.c = self.weight(k, lr)
        if k + 1 == self.steps:
            self.c_at_end = self.c
        return self.c

    def __call__(self, k: int) -> float:
        if k + 1 <= self.steps:
            return self.b1
        s = self.c / (1 - self.c) * (1 - self.c_at_end) / self.c_at_end
        return 1 - (1 - self.b1) * s**self.rho
