"""The voices: every way of running a case, and whether it can be run that way."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from parity_tests.registry.case import STEPS, Case
from parity_tests.runners import in_jax, in_numpy, in_torch
from parity_tests.runners.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Voice:
    """One way of running one package."""

    package: str  # "reference", "sf_jax", "sf_torch", "meta" or "optax"
    framework: str  # "numpy", "jax" or "torch"
    run: Callable[..., Trajectory]
    options: dict[str, Any]
    most_steps: int = STEPS
    costly: bool = False  # run only for cases that are ``thorough``


def _jax(mode: str, store_x: bool = False, most_steps: int = STEPS) -> Voice:
    options = {"mode": mode, "store_x": store_x}
    costly = mode != "scan" or store_x  # each compiles a program of its own
    return Voice("sf_jax", "jax", in_jax.run, options, most_steps, costly)


def _torch(form: str = "", most_steps: int = STEPS, **ways: bool) -> Voice:
    options = {"form": form, **ways}
    return Voice("sf_torch", "torch", in_torch.run, options, most_steps)


# Voices that share their arithmetic with another voice take fewer steps.
VOICES: dict[str, Voice] = {
    "reference": Voice("reference", "numpy", in_numpy.run_reference, {}),
    "jax scan": _jax("scan"),
    "jax scan, x stored": _jax("scan", True),
    "jax jit": _jax("jit", most_steps=100),
    "jax jit, x stored": _jax("jit", True, most_steps=100),
    # An operation without jit takes as long as a whole step with it.
    "jax eager": _jax("eager", most_steps=8),
    "jax eager, x stored": _jax("eager", True, most_steps=8),
    "torch": _torch(),
    "torch foreach": _torch(foreach=True, most_steps=100),
    "torch blocks": _torch(blocks=True, most_steps=100),
    "torch fused": _torch(fused=True, most_steps=12),  # slow where interpreted
    "torch Reference": _torch("Reference", most_steps=100),
    "torch Closure": _torch("Closure", most_steps=100),
    "golden": Voice("golden", "numpy", in_numpy.run_golden, {}),
    "meta": Voice("meta", "torch", in_torch.run, {"package": "meta"}),
    "optax": Voice("optax", "jax", in_jax.run, {"package": "optax"}),
}


def unsupported(case: Case, voice: str, device: str = "cpu") -> str | None:
    """Why the voice can't run the case on a device, or None."""
    row = VOICES[voice]
    if row.options.get("fused") and (reason := in_torch.unfused(case, device)):
        return reason
    form = row.options.get("form", "")
    if form and form not in case.optimizer.torch_forms:
        return f"{case.optimizer.name} has no {form} form"
    if voice == "golden":
        return None if case.recorded else "was not recorded"
    return None if voice == "reference" else case.unsupported(row.package)


@functools.cache  # a third of a megabyte each
def _cached(case: Case, voice: str, steps: int, device: str) -> Trajectory:
    row = VOICES[voice]
    return row.run(case, steps, device, **row.options)


def run(
    case: Case, voice: str, steps: int | None = None, device: str = "cpu"
) -> Trajectory:
    """The trajectory of a case in a voice.

    It has ``steps`` steps, or all of the case's, but no more than the voice's
    ``most_steps``. On CUDA PyTorch's voices differ in their kernels and take all steps.
    """
    most = case.steps
    if not (device == "cuda" and VOICES[voice].framework == "torch"):
        most = min(most, VOICES[voice].most_steps)
    return _cached(case, voice, min(steps or most, most), device)
