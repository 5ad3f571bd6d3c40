"""How far two implementations may be apart, in ulps, and why.

An ulp is ``eps · max(1, max|w|)`` with the largest weight of the leaf at that step.
No limit here is widened to make a case pass. A case that needs more has a limit of its
own, with its reason, in the module of its optimizer in the registry.
"""

from collections.abc import Mapping

from parity_tests.registry.case import Limit

# With bfloat16 parameters the state is float32, and the state is compared.
_EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-23, "float64": 2.0**-52}

_RANDOM_WALK = "z and y are each rounded once a step; over 300 steps it adds up"
_SAME_ON_ACCELERATORS = (
    f"{_RANDOM_WALK}. Quotients and roots good to a few ulps of a step change nothing"
)
_DOUBLE = f"{_RANDOM_WALK}, and powers are taken in another order"

# Against the float64 reference, by dtype and device.
REFERENCE: dict[tuple[str, str], Limit] = {
    ("float32", "cpu"): Limit(12, _RANDOM_WALK),
    ("float32", "gpu"): Limit(12, _SAME_ON_ACCELERATORS),
    ("float32", "tpu"): Limit(12, _SAME_ON_ACCELERATORS),
    ("bfloat16", "cpu"): Limit(12, f"{_RANDOM_WALK}: the state is float32"),
    ("bfloat16", "gpu"): Limit(12, f"{_RANDOM_WALK}: the state is float32"),
    ("bfloat16", "tpu"): Limit(12, f"{_RANDOM_WALK}: the state is float32"),
    ("float64", "cpu"): Limit(64, _DOUBLE),
    ("float64", "gpu"): Limit(64, _DOUBLE),
}

# Against Meta's package, and of our two against each other.
EACH_OTHER: dict[str, Limit] = {
    "float32": Limit(2e-6 * 2**23, "2e-6: the promise"),
    "bfloat16": Limit(2e-6 * 2**23, "2e-6: the promise, of the float32 state"),
    "float64": Limit(128, "each is within 64 of the reference"),
}

# Meta's against the reference: that both read the formulas alike, not how it rounds.
META: dict[str, Limit] = EACH_OTHER

# optax.contrib against the reference.
OPTAX = Limit(64, "it loses more digits: x is had by dividing a difference by b1")
OPTAX_WARMUP = Limit(
    1000, "its average sees the step size of the next step", differs=True
)

GOLDEN = Limit(1e-11 * 2**52, "1e-11: the promise for what others recorded")

# x of the published AlgoPerf entries in runs of their own, relative to the length of
# the path: each framework differentiates by itself, so that gradients differ in their
# last digits.
ALGOPERF = 2e-5
# With v in bfloat16 such a difference now and then rounds v to its other neighbour,
# 1/256 away.
ALGOPERF_BFLOAT16_V = 1e-3


def eps(dtype: str) -> float:
    return _EPS[dtype]


def limit(
    dtype: str,
    package: str,
    against: str,
    device: str = "cpu",
    *,
    own: Mapping[str, Limit] | None = None,
    warmup: bool = False,
) -> Limit:
    """The limit for ``package`` on a device, against "reference" or another voice.

    Args:
      own: the case's own limits by package, where it has any.
      warmup: whether the case warms the step size up.
    """
    if package == "optax":
        return OPTAX_WARMUP if warmup else OPTAX
    if package == "meta":
        return META[dtype]
    if against == "golden":
        return GOLDEN
    if against != "reference":
        return EACH_OTHER[dtype]
    if own and package in own:
        return own[package]
    return REFERENCE[dtype, "gpu" if device == "cuda" else device]
