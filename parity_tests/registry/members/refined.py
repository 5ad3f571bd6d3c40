"""Refined Schedule-Free, over AdamW."""

import dataclasses
from typing import Any

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer, pick, warmup
from parity_tests.registry.options import Linear, Options, function
from parity_tests.registry.rows import BFLOAT16, DECAY, FLOAT64, cases


@dataclasses.dataclass(frozen=True)
class RefinedOptions(Options):
    """Adds C, the factor of the averaging weight."""

    refined_c: float = 10.0


def _reference(o: RefinedOptions) -> reference.Seams:
    b1 = function(o.b1)
    average = reference.PolynomialAverage(o.r, o.weight_lr_power)
    return reference.Seams(
        b1,
        warmup(o),
        reference.AdamW(o.b2, o.eps, o.weight_decay, o.decay_at, o.inner_momentum),
        reference.refined(average, b1, o.refined_c),
    )


def _jax(o: RefinedOptions, store_x: bool) -> Any:
    return sf_jax.schedule_free_adamw(
        o.lr,
        o.warmup_steps,
        o.b1,
        o.b2,
        o.eps,
        o.weight_decay,
        o.weight_lr_power,
        r=o.r,
        decay_at=o.decay_at,
        average=sf_jax.refined_average(o.refined_c),
        store_x=store_x,
    )


def _arguments(o: RefinedOptions) -> dict[str, Any]:
    same = pick(o, "lr eps weight_decay warmup_steps r weight_lr_power decay_at")
    return {**same, "betas": (o.b1, o.b2)}


def _torch(groups: list[Any], o: RefinedOptions, form: str, foreach: bool) -> Any:
    return sf_torch.AdamWScheduleFreeRefined(
        groups, foreach=foreach, refined_c=o.refined_c
    )


OPTIMIZER = Optimizer(
    "refined",
    reference=_reference,
    jax=_jax,
    arguments=_arguments,
    torch=_torch,
    options=RefinedOptions,
    torch_forms=("",),
    replays="AdamWScheduleFreeRefined",
)

CASES = cases(
    OPTIMIZER,
    ("plain", {}, {}),
    ("decay_z", {**DECAY, "decay_at": "z"}, {}),
    ("b1_schedule", {"b1": Linear(0.7, 0.98)}, {}),
    ("bfloat16", {}, BFLOAT16),
    ("float64", DECAY, FLOAT64),
    b1=0.95,
    refined_c=50.0,
    warmup_steps=20,
)
