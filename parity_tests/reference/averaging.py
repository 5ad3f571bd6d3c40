"""Averaging weights: the c with which x moves towards z, from k and lr_k."""

from collections.abc import Callable

Weight = Callable[[int, float], float]  # k, lr_k -> c


class PolynomialAverage:
    """c = w / W, with w = (k+1)^r · lr_max^weight_lr_power and W the sum of all w.

    lr_max is the largest lr_k so far. c is 0 while W is 0.
    """

    def __init__(self, r: float = 0.0, weight_lr_power: float = 2.0) -> None:
        # As floats: Python computes a power of integers to its last digit.
        self.r, self.weight_lr_power = float(r), float(weight_lr_power)
        self.lr_max = self.weight_sum = 0.0

    def __call__(self, k: int, lr: float) -> float:
        self.lr_max = max(self.lr_max, lr)
        w = (k + 1) ** self.r * self.lr_max**self.weight_lr_power
        self.weight_sum += w
        return w / self.weight_sum if self.weight_sum > 0 else 0.0


class AverageAfter:
    """c = 1 for the first c_warmup steps, and ``average`` from then on.

    The first steps add nothing to W, but their lr_k count for lr_max.
    """

    def __init__(self, c_warmup: int, average: Weight) -> None:
        self.c_warmup, self.average = c_warmup, average

    def __call__(self, k: int, lr: float) -> float:
        if k >= self.c_warmup:
            return self.average(k, lr)
        self.average.lr_max = max(self.average.lr_max, lr)  # type: ignore[attr-defined]
        return 1.0


def refined(average: Weight, b1: Callable[[int], float], c: float) -> Weight:
    """Refined Schedule-Free: c_k = min(1, (1 - β) C w / W)."""

    def weight(k: int, lr: float) -> float:
        return min(1.0, (1 - b1(k)) * c * average(k, lr))

    weight.memory = average  # type: ignore[attr-defined]  # replay sets its sums
    return weight


def exponential(mu_x: float) -> Weight:
    """GPA: c = 1 - μ_x at every step."""
    return lambda k, lr: 1 - mu_x
