"""How far two trajectories are apart, at which step and in which leaf."""

import dataclasses

import numpy as np

from parity_tests.compare import tolerances
from parity_tests.runners.trajectory import SEQUENCES, Trajectory


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
    """The distance at every step in ulps of b, by (sequence, leaf).

    An ulp is ``eps · max(1, max|w|)``, with eps of the dtype and the largest weight of
    the leaf in b at that step. bfloat16 cases use the eps of float32, in which the
    state is kept: the rounding of the parameters to bfloat16 is subtracted from their
    distance first.

    Raises:
      ValueError: trajectories of different leaves or shapes.
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
    """The largest of :func:`distances`, with its sequence, leaf and step."""
    worst = Distance(0.0)
    for (sequence, leaf), ulps in distances(a, b, dtype).items():
        if ulps.size and ulps.max() > worst.ulps:
            worst = Distance(float(ulps.max()), sequence, leaf, int(ulps.argmax()))
    return worst


def curve(a: Trajectory, b: Trajectory, dtype: str, sequence: str) -> np.ndarray:
    """The largest distance over all leaves at every step, of one sequence."""
    found = [u for (name, _), u in distances(a, b, dtype).items() if name == sequence]
    return np.max(found, axis=0) if found else np.full(len(b), np.nan)
