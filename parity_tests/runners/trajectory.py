"""A trajectory: y, x and z after every step of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.reference import wide

SEQUENCES = ("y", "x", "z")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Arrays (steps, \\*shape) by leaf, in float64 or complex128.

    ``x`` is None where the implementation cannot give it. ``rounding`` is None where
    the parameters hold y exactly. bfloat16 parameters hold y rounded; ``rounding`` is
    then the largest possible difference, for every entry of y.
    """

    y: dict[str, np.ndarray]
    x: dict[str, np.ndarray] | None
    z: dict[str, np.ndarray]
    rounding: dict[str, np.ndarray] | None = None

    @classmethod
    def stacked(
        cls, steps: Sequence[Sequence[Mapping[str, Any] | None]]
    ) -> "Trajectory":
        """Makes a trajectory of (y, x, z) of every step, each arrays by leaf."""

        def stack(sequence: Sequence[Mapping[str, Any] | None]) -> Any:
            if any(leaves is None for leaves in sequence):
                return None
            return {
                n: wide(np.stack([leaves[n] for leaves in sequence if leaves]))
                for n in sequence[0] or ()
            }

        return cls(*map(stack, zip(*steps, strict=True)))

    def with_rounding(
        self, changes_from: Mapping[str, np.ndarray] | None = None
    ) -> "Trajectory":
        """Sets ``rounding`` to that of y to bfloat16: half the spacing at y.

        Args:
          changes_from: the initial weights. Give them where the change of y is rounded
            to bfloat16 before it is added, as optax does. That rounding is at most
            2^-8 of the change, and it may move the rounding of the sum by as much
            again. Together that is 2^-7 of the exact change, or 1/127 of the change
            that is seen.
        """
        rounding = {}
        for name, y in self.y.items():
            spacing = np.ldexp(1.0, np.frexp(np.abs(y))[1] - 8)  # 8 binary digits
            rounding[name] = spacing / 2
            if changes_from is not None:
                before = wide(changes_from[name])[None]
                change = np.abs(np.diff(y, axis=0, prepend=before))
                rounding[name] += change / 127
        return dataclasses.replace(self, rounding=rounding)

    def __len__(self) -> int:
        return len(next(iter(self.y.values())))
