"""Compares the voices of a case, and says which comparisons a case has.

>>> from parity_tests.registry import CASES
>>> from parity_tests.compare.harness import check
>>> outcome = check(CASES[0], "jax scan", "reference", steps=20)
>>> outcome.ok
True
"""

import dataclasses
from collections.abc import Callable, Iterable

from parity_tests.compare import tolerances
from parity_tests.compare.distance import Distance, compare
from parity_tests.compare.tolerances import Limit
from parity_tests.registry.case import Case
from parity_tests.runners.voices import VOICES, run, unsupported

Pair = tuple[str, str]  # (voice, the voice it is compared with)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far the voice is from the voice ``against``, and how far it may be."""

    case: str
    voice: str
    against: str
    distance: Distance
    limit: Limit

    @property
    def ok(self) -> bool:
        return (self.distance.ulps > self.limit.ulps) == self.limit.differs


def check(
    case: Case,
    voice: str,
    against: str,
    steps: int | None = None,
    device: str = "cpu",
    other_device: str = "cpu",
) -> Outcome:
    """Runs a case in two voices and compares y, x and z at every step."""
    trajectories = (
        run(case, voice, steps, device),
        run(case, against, steps, other_device),
    )
    distance = compare(*trajectories, case.dtype)
    limit = tolerances.limit(
        case.dtype,
        VOICES[voice].package,
        against,
        device,
        own=case.tolerance,
        warmup="warmup" in case.features,
    )
    return Outcome(case.name, voice, against, distance, limit)


def comparisons(
    case: Case,
    voices: Iterable[str] = tuple(VOICES),
    device_of: Callable[[str], str] = lambda voice: "cpu",
) -> list[Pair]:
    """The pairs (voice, against) of a case, of those voices that can run it.

    Every voice is compared with the reference, ours also with Meta's and with the
    golden file where there is one, and JAX with PyTorch.
    """
    able = [
        v
        for v in dict.fromkeys((*voices, "reference"))
        if unsupported(case, v, device_of(v)) is None
        and (case.thorough or not VOICES[v].costly)
    ]
    ours = [v for v in able if VOICES[v].package in ("sf_jax", "sf_torch")]
    pairs = [(v, "reference") for v in able if v not in ("reference", "golden")]
    if "meta" in able:
        pairs += [(voice, "meta") for voice in ours]
    if "golden" in able:
        pairs += [(voice, "golden") for voice in (*ours, "reference")]
    if "jax scan" in able and "torch" in able:
        pairs.append(("jax scan", "torch"))
    return pairs
