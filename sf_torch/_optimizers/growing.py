"""A β that grows towards 1, by the number of the step or by the averaging weight.

    1 - β_t = (1 - β_1) S_t^ρ after T_0 steps, and β_1 until then
    S_t = (T_0 - 1) / (t - 1)                              Eq. 1 of the paper
    S_t = (c_t / (1 - c_t)) ((1 - c_T0) / c_T0)            the authors' code

Without warmup c_t is 1 / t, and the two are the same.

References:
  Kim et al., *AMUSE: Anytime Muon with Stable Gradient Evaluation*,
    https://arxiv.org/abs/2605.22432, and https://github.com/kjeiun/amuse,
    ``src/optim/AMUSE.py``
"""

import dataclasses
import functools
from typing import Any

from sf_torch import _arguments


@dataclasses.dataclass(frozen=True)
class Growing:
    """What :func:`growing_b1` returns: β as a function of k."""

    b1: float
    steps: int
    rho: float
    by_weight: bool = False  # as in the authors' code

    def __call__(self, k: int) -> float:
        """β of the y that step k forms, where gradient t = k + 2 is taken."""
        return self._grown(min(1.0, (self.steps - 1) / (k + 1)))

    def of_weight(self, k: int, ckp1: float, power: float) -> float:
        """The same by the weight of step t = k + 1, warmup weighed to this power."""
        if k + 1 <= self.steps:
            return self.b1
        return self._grown(ckp1 / (1 - ckp1) * _warmup(self.steps, power))

    def _grown(self, ratio: float) -> float:
        return 1 - (1 - self.b1) * ratio**self.rho


def _beta(value: Any) -> Any:
    if isinstance(value, Growing):
        return value
    return _arguments.INTERPOLATION.read(value)


BETA = _arguments.INTERPOLATION._replace(
    accepts=f"{_arguments.INTERPOLATION.accepts} or what growing_b1 returns",
    read=_beta,
)
OF_WRAPPER = {**_arguments.ARGUMENTS, "momentum": BETA}
OF_MUON = {
    **_arguments.OF_MUON,
    "betas": _arguments.pair(BETA, _arguments.DECAY_RATE),
}


def growing_b1(b1: float = 0.9, steps: int = 1000, rho: float = 0.5) -> Growing:
    r"""A β that grows towards 1: gradients near z at first, near x later on.

    .. math::

        1 - \beta_t = (1 - \beta_1) \left( \frac{T_0 - 1}{t - 1} \right)^\rho
        \quad\text{after } T_0 \text{ steps}

    with t = 1 at the first gradient. It is ``sf_jax.growing_b1``, for the first of the
    ``betas`` of :class:`MuonScheduleFree` and the ``momentum`` of any wrapper. Other
    optimizers take a number: set it in their groups before each step.

    Args:
      b1: β for the first ``steps`` steps, in [0, 1].
      steps: T_0, at least 2.
      rho: how fast β grows; 0 for a constant.

    Returns:
      A function of k, the number of steps taken.

    Raises:
      ValueError: an argument out of its range.

    Examples:
      >>> import sf_torch
      >>> b1 = sf_torch.growing_b1(0.9, steps=101, rho=1.0)
      >>> [round(b1(k), 3) for k in (0, 99, 199, 999)]
      [0.9, 0.9, 0.95, 0.99]

    References:
      Kim et al., *AMUSE*, https://arxiv.org/abs/2605.22432
    """
    given: dict[str, Any] = {"b1": b1, "steps": steps, "rho": rho}
    _arguments.options(given)
    return Growing(**given)


@functools.cache
def _warmup(steps: int, power: float) -> float:
    """The weights of a warmup before its last step, over that of the last."""
    return sum((t / steps) ** power for t in range(1, steps))
