"""The weight decay of GPA's published code, which holds one of y and z still."""

from collections.abc import Mapping

import numpy as np

from parity_tests.reference.rule import ScheduleFree


class HeldDecay(ScheduleFree):
    """The rule, with a decay before each step that shrinks z or y and holds the other.

    x is recomputed so that y = (1 - β) z + β x still holds.

    Args:
      args: those of :class:`ScheduleFree`.
      shrink: the factor of the decayed sequence is 1 - shrink.
      at: "z" or "y", the sequence that is decayed.
      b1: β.
    """

    def __init__(self, *args: object, shrink: float, at: str, b1: float) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.shrink, self.at, self.b1 = shrink, at, b1

    def step(
        self,
        grads: Mapping[str, np.ndarray | None],
        value: float | None = None,
        grad_norm: float | None = None,
    ) -> None:
        leaves = self.z if self.at == "z" else self.y
        for n in leaves:
            leaves[n] = (1 - self.shrink) * leaves[n]
            self.x[n] = (self.y[n] - (1 - self.b1) * self.z[n]) / self.b1
        super().step(grads, value, grad_norm)
