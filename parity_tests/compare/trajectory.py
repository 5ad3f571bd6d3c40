"""y, x and z at every step, and how far two such trajectories part."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.compare import tolerances

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


def wide(leaf: Any) -> np.ndarray:
    """As float64 or complex128."""
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


@dataclasses.dataclass(frozen=True, order=True)
class Distance:
    """The largest distance between two trajectories, and where it is."""

    ulps: float
    sequence: str = ""
    leaf: str = ""
    step: int = 0  # the first is 0

    def __str__(self) -> str:
        where = f" {self.sequence}.{self.leaf}@{self.step}" if self.leaf else ""
        return f"{self.ulps:.2f}{where}"


def distances(
    a: Trajectory, b: Trajectory, dtype: str
) -> dict[tuple[str, str], np.ndarray]:
    """By (sequence, leaf) the distance at every step in ulps; b is the yardstick.

    An ulp is ``eps · max(1, max|w|)`` with the largest weight of the leaf at that step
    and the dtype's eps; for bfloat16, float32's: that is what the state is kept in,
    and a parameter's own rounding is taken off before its distance is measured.
    """
    found = {}
    steps = min(len(a), len(b))
    for name in SEQUENCES:
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours is None or theirs is None:
            continue
        if set(ours) != set(theirs):
            raise ValueError(f"different leaves: {sorted(ours)} and {sorted(theirs)}")
        for leaf in ours:
            p, q = ours[leaf][:steps], theirs[leaf][:steps]
            if p.shape != q.shape:
                raise ValueError(f"{leaf}: shapes {p.shape[1:]} and {q.shape[1:]}")
            apart = np.abs(p - q)
            for trajectory in (a, b):
                if name == "y" and trajectory.rounding:
                    rounding = trajectory.rounding[leaf][:steps]
                    apart = np.maximum(apart - rounding, 0)
            axes = tuple(range(1, p.ndim))
            largest = np.abs(q).max(axis=axes, initial=1.0)
            apart = apart.max(axis=axes, initial=0.0)
            ulps = apart / (tolerances.eps(dtype) * largest)
            found[name, leaf] = np.where(np.isnan(ulps), np.inf, ulps)
    return found


def compare(a: Trajectory, b: Trajectory, dtype: str) -> Distance:
    """The worst of :func:`distances`, and in which sequence, leaf and step."""
    worst = Distance(0.0)
    for (sequence, leaf), ulps in distances(a, b, dtype).items():
        if ulps.size and ulps.max() > worst.ulps:
            worst = Distance(float(ulps.max()), sequence, leaf, int(ulps.argmax()))
    return worst


def curve(a: Trajectory, b: Trajectory, dtype: str, sequence: str) -> np.ndarray:
    """The distance of one sequence at every step, over all leaves."""
    found = [u for (name, _), u in distances(a, b, dtype).items() if name == sequence]
    return np.max(found, axis=0) if found else np.full(len(b), np.nan)
