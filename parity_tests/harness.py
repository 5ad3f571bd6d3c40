"""Runs cases in voices, and says how far they are from what they should equal.

>>> from parity_tests.cases import CASES
>>> from parity_tests.harness import check
>>> outcome = check(CASES[0], "jax scan", "reference", steps=20)
>>> outcome.ok
True
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from parity_tests import in_jax, in_torch, reference, tolerances
from parity_tests.cases import STEPS, Case
from parity_tests.tolerances import Limit
from parity_tests.trajectory import Distance, Trajectory, compare


@dataclasses.dataclass(frozen=True)
class Voice:
    """One way of running one package."""

    package: str  # "reference", "sf_jax", "sf_torch", "meta" or "optax"
    framework: str  # "numpy", "jax" or "torch": which device it wants
    run: Callable[..., Trajectory]
    options: dict[str, Any]
    most_steps: int = STEPS


def _run_reference(case: Case, steps: int, device: str = "cpu") -> Trajectory:
    source = case.source(steps)
    groups = [(leaves, case.optimizer.reference(o)) for leaves, o in case.group_options]
    optimizer = reference.ScheduleFree(case.params, groups)
    record = []
    for k in range(steps):
        value, grads = source.numpy(optimizer.y, source.at(k))
        optimizer.step(grads, value)
        record.append((dict(optimizer.y), dict(optimizer.x), dict(optimizer.z)))
    return Trajectory.stacked(record)


def _jax(mode: str, store_x: bool = False, **most: int) -> Voice:
    options = {"mode": mode, "store_x": store_x}
    return Voice("sf_jax", "jax", in_jax.run, options, **most)


def _torch(form: str = "", foreach: bool = False) -> Voice:
    options = {"form": form, "foreach": foreach}
    return Voice("sf_torch", "torch", in_torch.run, options)


VOICES: dict[str, Voice] = {
    "reference": Voice("reference", "numpy", _run_reference, {}),
    "jax scan": _jax("scan"),
    "jax scan, x stored": _jax("scan", True),
    "jax jit": _jax("jit"),
    "jax jit, x stored": _jax("jit", True),
    # Without jit an operation costs as much as a whole step with it.
    "jax eager": _jax("eager", most_steps=8),
    "jax eager, x stored": _jax("eager", True, most_steps=8),
    "torch": _torch(),
    "torch foreach": _torch(foreach=True),
    "torch Reference": _torch("Reference"),
    "torch Closure": _torch("Closure"),
    "meta": Voice("meta", "torch", in_torch.run, {"package": "meta"}),
    "optax": Voice("optax", "jax", in_jax.run, {"package": "optax"}),
}


def unsupported(case: Case, voice: str) -> str | None:
    """Why the voice can't run the case, or None."""
    row = VOICES[voice]
    form = row.options.get("form", "")
    if form not in case.optimizer.torch_forms:
        return f"{case.optimizer.name} has no {form} form"
    return None if voice == "reference" else case.unsupported(row.package)


@functools.lru_cache(maxsize=256)
def _cached(case: Case, voice: str, steps: int, device: str) -> Trajectory:
    row = VOICES[voice]
    return row.run(case, steps, device, **row.options)


def run(case: Case, voice: str, steps: int = STEPS, device: str = "cpu") -> Trajectory:
    """The trajectory of a case in a voice; fewer steps where the voice is slow."""
    return _cached(case, voice, min(steps, VOICES[voice].most_steps), device)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far ``voice`` was from ``against``, and how far it may be."""

    case: str
    voice: str
    against: str
    distance: Distance
    limit: Limit

    @property
    def ok(self) -> bool:
        return self.distance.ulps <= self.limit.ulps


def check(
    case: Case, voice: str, against: str, steps: int = STEPS, device: str = "cpu"
) -> Outcome:
    """Compares two voices at every step, in y, x and z."""
    distance = compare(
        run(case, voice, steps, device), run(case, against, steps, "cpu"), case.dtype
    )
    limit = tolerances.limit(case, VOICES[voice].package, against, device)
    return Outcome(case.name, voice, against, distance, limit)
