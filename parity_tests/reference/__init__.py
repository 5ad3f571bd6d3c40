"""The float64 reference: one module a seam, and the rule that the seams fit into.

The formulas stand as the papers write them: x, y and z are all stored, and nothing is
done for speed, memory or rounding. Every name is handed on from here.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
  Defazio, *ScheduleFree+*, https://arxiv.org/abs/2605.19095
  Song et al., *Through the River*, https://arxiv.org/abs/2507.09846 (Refined)
  Defazio et al., *Smoothing DiLoCo with Primal Averaging*,
    https://arxiv.org/abs/2512.17131 (GPA)
  Kim et al., *AMUSE*, https://arxiv.org/abs/2605.22432 (the growing β)
"""

from parity_tests.reference.averaging import (
    AverageAfter,
    PolynomialAverage,
    Weight,
    exponential,
    refined,
)
from parity_tests.reference.base_steps import SGD, AdamC, AdamW, InPlaceAdamW, RAdam
from parity_tests.reference.held_decay import HeldDecay
from parity_tests.reference.interpolation import GrowingByWeight, annealed, growing
from parity_tests.reference.muon import Muon, orthogonalised
from parity_tests.reference.prodigy import AlgoPerfProdigy, Prodigy, weighed_by_d
from parity_tests.reference.rule import Leaves, Now, ScheduleFree, Seams, wide
from parity_tests.reference.step_sizes import (
    PolyakStep,
    at_least,
    paper_step_size,
    rectified,
    rho,
    warmup,
)

__all__ = [
    "SGD",
    "AdamC",
    "AdamW",
    "AlgoPerfProdigy",
    "AverageAfter",
    "GrowingByWeight",
    "HeldDecay",
    "InPlaceAdamW",
    "Leaves",
    "Muon",
    "Now",
    "PolyakStep",
    "PolynomialAverage",
    "Prodigy",
    "RAdam",
    "ScheduleFree",
    "Seams",
    "Weight",
    "annealed",
    "at_least",
    "exponential",
    "growing",
    "orthogonalised",
    "paper_step_size",
    "rectified",
    "refined",
    "rho",
    "warmup",
    "weighed_by_d",
    "wide",
]
