"""What a run gives: y, x and z at every step."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.reference import wide

SEQUENCES = ("y", "x", "z")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """By leaf, (steps, \\*shape) in float64 or complex128.

    ``x`` is None where the implementation can't give it. ``rounding`` is how far the
    parameters may be from y for being bfloat16, like y; None where they hold it.
    """

    y: dict[str, np.ndarray]
    x: dict[str, np.ndarray] | None
    z: dict[str, np.ndarray]
    rounding: dict[str, np.ndarray] | None = None

    @classmethod
    def stacked(
        cls, steps: Sequence[Sequence[Mapping[str, Any] | None]]
    ) -> "Trajectory":
        """From (y, x, z) of every step, each leaves by name."""

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
        """With what rounding y to bfloat16 does: half a spacing.

        ``changes_from``: the initial weights, where each step's change is rounded to
        bfloat16 before it is added, and the sum again. The first is by 2^-8 of the
        change at most, and the second adds to half a spacing no more than the first:
        2^-7 of the change as it was, which is 1/127 of what came of it.
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
