"""Schedules of β, the weight of x in y, as functions of the step k."""

from collections.abc import Callable
from math import exp, log


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
