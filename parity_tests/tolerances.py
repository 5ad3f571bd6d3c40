"""How far two implementations may be apart, in ulps, and why.

An ulp is ``eps · max(1, max|w|)``. Nothing here is widened to make a case pass: a
case that needs more says so, with its reason, in its own row of the registry.
"""

from typing import Any, NamedTuple

# 2^-23 and 2^-52. Where parameters are bfloat16, what is compared is float32 state.
_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-23, "float64": 2.0**-52}


class Limit(NamedTuple):
    """In ulps."""

    ulps: float
    reason: str


# What each step rounds off (z, then y or x) is at most an ulp, and it adds up as a
# random walk over 300 steps.
_FLOAT32 = Limit(12.0, "a rounding of z and of y a step, adding up at random")

# (dtype, device kind) -> the limit against the float64 reference
REFERENCE: dict[tuple[str, str], Limit] = {
    ("float32", "cpu"): _FLOAT32,
    ("bfloat16", "cpu"): _FLOAT32,
    ("float64", "cpu"): Limit(4500.0, "1e-12: powers and sums in another order"),
}

META = Limit(16.7, "2e-6: what this project promises")
GOLDEN = 1e-11  # relative, float64: the promise for trajectories that were recorded


def eps(dtype: str) -> float:
    return _EPS[dtype]


def limit(case: Any, package: str, against: str, device: str = "cpu") -> Limit:
    return REFERENCE[case.dtype, "cpu"]
