"""ScheduleFree+: AdamC with a Polyak step, and β that may grow."""

import dataclasses
from math import inf, nan
from typing import Any

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer
from parity_tests.registry.options import Linear, Options, Schedule, function
from parity_tests.registry.rows import BFLOAT16, DECAY, FLOAT64, Row, cases


@dataclasses.dataclass(frozen=True)
class PlusOptions(Options):
    """Adds the options of ScheduleFree+, which anneals β by itself: b1 is a number."""

    b1: float = 0.9
    polyak_beta: float = 0.0
    c_warmup: int = 0
    b1_anneal_steps: int = 0
    b1_max: float = 0.965
    upstream_compatible: bool = False
    loss_floor: float | Schedule = 0.0


def _reference(o: PlusOptions) -> reference.Seams:
    b1 = reference.annealed(o.b1, o.b1_max, o.b1_anneal_steps)
    return reference.Seams(
        b1,
        reference.PolyakStep(
            function(o.lr),
            o.eps,
            b1,
            o.polyak_beta,
            o.upstream_compatible,
            function(o.loss_floor),
        ),
        reference.AdamC(o.b2, o.eps, o.weight_decay, "y", o.inner_momentum),
        reference.AverageAfter(
            o.c_warmup, reference.PolynomialAverage(o.r, o.weight_lr_power)
        ),
    )


def _jax(o: PlusOptions, store_x: bool) -> Any:
    return sf_jax.schedule_free_plus(
        o.lr,
        o.inner_momentum,
        o.b2,
        o.b1,
        o.eps,
        o.weight_decay,
        o.r,
        o.polyak_beta,
        o.c_warmup,
        o.b1_anneal_steps,
        o.b1_max,
        o.weight_lr_power,
        store_x=store_x,
        upstream_compatible=o.upstream_compatible,
        loss_floor=o.loss_floor,
    )


def _arguments(o: PlusOptions) -> dict[str, Any]:
    return {
        "lr": o.lr,
        "betas": (o.inner_momentum, o.b2),
        "sf_beta1": o.b1,
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "r": o.r,
        "polyak_beta": o.polyak_beta,
        "c_warmup": o.c_warmup,
        "sf_beta1_anneal_steps": o.b1_anneal_steps,
        "sf_beta1_max": o.b1_max,
        "weight_lr_power": o.weight_lr_power,
        "upstream_compatible": o.upstream_compatible,
    }


def _torch(groups: list[Any], o: PlusOptions, form: str, foreach: bool) -> Any:
    names = {"": "AdamCScheduleFreePlus", "Reference": "AdamCScheduleFreePlusPaper"}
    make = getattr(sf_torch, names[form])
    return make(groups, foreach=foreach, loss_floor=o.loss_floor)


OPTIMIZER = Optimizer(
    "plus",
    reference=_reference,
    jax=_jax,
    arguments=_arguments,
    torch=_torch,
    options=PlusOptions,
    torch_forms=("", "Reference"),
)

_GROWING = {"b1_anneal_steps": 100, "c_warmup": 10, "r": 2.0}
# The options in the golden files' ``meta``.
_RECORDED: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 5.0, "c_warmup": 10, "lr": 0.5},
    {"b1_anneal_steps": 50, "r": 2.0, "b2": 0.99},
    {"polyak_beta": 0.9, "weight_decay": 1.0},
)
_GOLDEN: list[Row] = [
    (
        f"golden_{i}",
        {"upstream_compatible": True, **options},
        {**FLOAT64, "recorded": f"schedule_free_plus_{i}"},
    )
    for i, options in enumerate(_RECORDED)
]
CASES = cases(
    OPTIMIZER,
    ("plain", {}, {}),
    ("decay", {"weight_decay": 1.0, "lr": 0.5}, {}),
    ("growing", _GROWING, {}),
    ("polyak_beta", {"polyak_beta": 0.9}, {}),
    ("lost_loss", {"polyak_beta": 0.9}, {"losses": {3: nan, 5: inf, 9: -inf}}),
    ("loss_floor", {"loss_floor": Linear(-0.5, 1.5), **DECAY}, {}),
    ("upstream", {"polyak_beta": 0.9, "upstream_compatible": True}, {}),
    ("bfloat16", {**_GROWING, **DECAY, "lr": 0.1}, BFLOAT16),
    ("float64", {**_GROWING, **DECAY}, FLOAT64),
    *_GOLDEN,
    lr=1.0,
    inner_momentum=0.9,
    b2=0.95,
)
