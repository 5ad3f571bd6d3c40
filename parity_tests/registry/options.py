"""Hyperparameters by the same names for every optimizer and framework."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

Schedule = Callable[[Any], Any]
"""A function of k, which is a Python int or a JAX count."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A :data:`Schedule` from ``start`` to ``end``."""

    start: float
    end: float
    steps: int = 300

    def __call__(self, k: Any) -> Any:
        return self.start + (self.end - self.start) * k / self.steps


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters in one neutral spelling. An optimizer reads those that it has.

    An optimizer with options of its own adds them in a subclass.
    """

    lr: float | Schedule = 0.0025
    warmup_steps: int = 0
    b1: float | Schedule = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_at: str = "y"
    weight_lr_power: float = 2.0
    r: float = 0.0
    inner_momentum: float = 0.0
    silent_sgd_phase: bool = True
    base_momentum: float = 0.0  # of the optimizer that the wrapper wraps
    nesterov: bool = False  # of the wrapped optimizer

    def at(self, k: int) -> Self:
        """The options with lr and b1 as numbers, as they are at step k."""
        return dataclasses.replace(
            self, lr=function(self.lr)(k), b1=function(self.b1)(k)
        )


def function(value: float | Schedule) -> Callable[[int], float]:
    """A number or a schedule as a function of k."""
    return value if callable(value) else lambda k: value
