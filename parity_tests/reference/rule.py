r"""The Schedule-Free rule, which stores x, y and z in float64.

.. math::

    z' &= z + u \\
    x' &= (1 - c) x + c z' \\
    y' &= (1 - \beta) z' + \beta x'

:class:`ScheduleFree` is this rule and nothing else. An optimizer is a choice for its
four seams (:class:`Seams`): the step size ``lr_k``, the base step ``u``, the
averaging weight ``c`` and the interpolation ``β``. A seam is any callable. A seam that
keeps state between steps, such as moments or sums, is a small class.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Leaves = dict[str, np.ndarray]  # by name, float64 or complex128


class Now(NamedTuple):
    """What a seam reads: the leaves of one parameter group before step k."""

    k: int  # 0 at the first step
    grads: Leaves  # without the leaves that have no gradient
    x: Leaves
    y: Leaves
    z: Leaves
    value: float | None  # the loss at y, or None where the caller has none
    groups: Sequence["Now"]  # every group of the step, this one included
    grad_norm: float | None = None  # of all gradients before they were clipped

    def total(self, term: Callable[["Now", str], float]) -> float:
        """The sum of ``term(now, leaf)`` over all leaves with a gradient."""
        return float(sum(term(now, leaf) for now in self.groups for leaf in now.grads))


class Seams(NamedTuple):
    """The four choices that make an optimizer, in the order of a step."""

    b1: Callable[[int], float]  # k -> β
    step_size: Callable[[Now], float]  # -> lr_k
    base: Callable[[Now, float], Leaves]  # now, lr_k -> u, which contains -lr_k
    average: Callable[[int, float], float]  # k, lr_k -> c
    # Whether x is what y and z imply with the β of this step, although another formed y
    x_anew: bool = False


class ScheduleFree:
    """The rule over parameter groups, each with seams of its own.

    A leaf without a gradient keeps its x and z. Its y is still recomputed from them,
    because β may have changed. All groups share one count of steps k.

    Args:
      params: the initial weights by leaf.
      groups: for every group the names of its leaves and its seams. Seams keep state:
        build new ones for each group and each run.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        groups: Sequence[tuple[Collection[str], Seams]],
    ) -> None:
        self.y = {name: wide(leaf) for name, leaf in params.items()}
        self.x, self.z = dict(self.y), dict(self.y)
        self.groups = groups
        self.k = 0

    def step(
        self,
        grads: Mapping[str, np.ndarray | None],
        value: float | None = None,
        grad_norm: float | None = None,
    ) -> None:
        """Takes one step.

        Args:
          grads: the gradients at y by leaf. A leaf that is absent or None has none.
          value: the loss at y, which ScheduleFree+ needs.
          grad_norm: the norm of all gradients together before they were clipped, which
            it may be given.
        """
        nows: list[Now] = []
        for names, _ in self.groups:
            given = {n: wide(g) for n in names if (g := grads.get(n)) is not None}
            x, y, z = ({n: at[n] for n in names} for at in (self.x, self.y, self.z))
            nows.append(Now(self.k, given, x, y, z, value, nows, grad_norm))
        for (_, seams), now in zip(self.groups, nows, strict=True):
            lr = seams.step_size(now)
            u = seams.base(now, lr)
            c = seams.average(self.k, lr)
            b1 = seams.b1(self.k)  # after c, which AMUSE's published β depends on
            for n in now.y:
                if seams.x_anew:
                    self.x[n] = (self.y[n] - (1 - b1) * self.z[n]) / b1
                if n in u:
                    self.z[n] = self.z[n] + u[n]
                    self.x[n] = (1 - c) * self.x[n] + c * self.z[n]
                self.y[n] = (1 - b1) * self.z[n] + b1 * self.x[n]
        self.k += 1


def wide(leaf: Any) -> np.ndarray:
    """The leaf as float64, or as complex128 where it is complex."""
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
