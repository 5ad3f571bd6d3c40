"""The registry's rows for what came after the first paper.

:data:`FAMILY` has the optimizers, :data:`FAMILY_CASES` the option sets that they are
run with; :mod:`parity_tests.registry` takes them up.
"""

import dataclasses
from typing import Any

import jax
import prodigyopt
import torch
from optax.contrib import MuonDimensionNumbers

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.reference import PolynomialAverage, Seams
from parity_tests.reference import family as reference_family
from parity_tests.registry.gradients import NETWORK, Tree
from parity_tests.registry.optimizers import Optimizer
from parity_tests.registry.options import Linear, Options, function


@dataclasses.dataclass(frozen=True)
class FamilyOptions(Options):
    """What the members have beside the rest. β is ``b1``, as everywhere here."""

    polyak_beta: float = 0.0
    c_warmup: int = 0
    b1_anneal_steps: int = 0
    b1_max: float = 0.965
    upstream_compatible: bool = False
    refined_c: float = 10.0
    mu_x: float = 0.99
    d0: float = 1e-3
    row_b2: float | None = None


# ScheduleFree+


def _plus_reference(o: Any) -> Seams:
    b1 = reference_family.annealed(o.b1, o.b1_max, o.b1_anneal_steps)
    return Seams(
        b1,
        reference_family.PolyakStep(
            function(o.lr), o.eps, b1, o.polyak_beta, o.upstream_compatible
        ),
        reference_family.AdamC(o.b2, o.eps, o.weight_decay, "y", o.inner_momentum),
        reference_family.AverageAfter(
            o.c_warmup, PolynomialAverage(o.r, o.weight_lr_power)
        ),
    )


def _plus_jax(o: Any, store_x: bool) -> Any:
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
    )


def _plus_arguments(o: Any) -> dict[str, Any]:
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


def _plus_torch(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
    names = {"": "AdamCScheduleFreePlus", "Reference": "AdamCScheduleFreePlusPaper"}
    return getattr(sf_torch, names[form])(groups, foreach=foreach)


# Refined Schedule-Free, over AdamW


def _refined_reference(o: Any) -> Seams:
    b1 = function(o.b1)
    return Seams(
        b1,
        reference.warmup(function(o.lr), o.warmup_steps),
        reference.AdamW(o.b2, o.eps, o.weight_decay, o.decay_at, o.inner_momentum),
        reference_family.refined(
            PolynomialAverage(o.r, o.weight_lr_power), b1, o.refined_c
        ),
    )


def _refined_jax(o: Any, store_x: bool) -> Any:
    return sf_jax.schedule_free_adamw(
        o.lr,
        o.warmup_steps,
        o.b1,
        o.b2,
        o.eps,
        o.weight_decay,
        decay_at=o.decay_at,
        average=sf_jax.refined_average(o.refined_c, o.b1, o.r, o.weight_lr_power),
        store_x=store_x,
    )


def _refined_arguments(o: Any) -> dict[str, Any]:
    return {
        "lr": o.lr,
        "betas": (o.b1, o.b2),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "warmup_steps": o.warmup_steps,
        "r": o.r,
        "weight_lr_power": o.weight_lr_power,
        "decay_at": o.decay_at,
    }


def _refined_torch(groups: list[Any], o: Any, form: str, foreach: bool) -> Any:
    return sf_torch.AdamWScheduleFreeRefined(
        groups, foreach=foreach, refined_c=o.refined_c
    )


# GPA, with the decay of its paper


def _gpa_reference(o: Any) -> Seams:
    return Seams(
        function(o.b1),
        reference.warmup(function(o.lr), o.warmup_steps),
        reference.AdamW(o.b2, o.eps, o.weight_decay, o.decay_at, o.inner_momentum),
        reference_family.exponential(o.mu_x),
    )


def _gpa_jax(o: Any, store_x: bool) -> Any:
    return sf_jax.gpa_adamw(
        o.lr,
        o.warmup_steps,
        o.b1,
        o.mu_x,
        o.inner_momentum,
        o.b2,
        o.eps,
        o.weight_decay,
        decay_at=o.decay_at,
        store_x=store_x,
    )


def _gpa_arguments(o: Any) -> dict[str, Any]:
    return {
        "lr": o.lr,
        "mu_y": o.b1,
        "mu_x": o.mu_x,
        "betas": (o.inner_momentum, o.b2),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "warmup_steps": o.warmup_steps,
        "decay_at": o.decay_at,
    }


def _gpa_torch(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
    return sf_torch.GPAAdamW(groups, foreach=foreach)


# Prodigy. Meta's wrapper and the authors' PyTorch Prodigy both count steps in the
# group's k, which then advances by two: it is not among the voices.


def _prodigy_reference(o: Any) -> Seams:
    base = reference_family.Prodigy(o.inner_momentum, o.b2, o.eps, o.weight_decay, o.d0)
    average = PolynomialAverage(o.r, o.weight_lr_power)
    return Seams(
        function(o.b1),
        reference.warmup(function(o.lr), o.warmup_steps),
        base,
        reference_family.weighed_by_d(average, base),
    )


def _prodigy_jax(o: Any, store_x: bool) -> Any:
    return sf_jax.schedule_free_prodigy(
        o.lr,
        o.warmup_steps,
        o.b1,
        o.b2,
        o.eps,
        o.weight_decay,
        o.weight_lr_power,
        r=o.r,
        inner_momentum=o.inner_momentum,
        estim_lr0=o.d0,
        store_x=store_x,
    )


def _prodigy_arguments(o: Any) -> dict[str, Any]:
    return {
        "lr": o.lr,
        # At 0 its step takes the new d in place of the one before; above 0 it does not.
        "betas": (o.inner_momentum or 1e-30, o.b2),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
    }


def _prodigy_torch(groups: list[Any], o: Any, form: str, foreach: bool) -> Any:
    base = prodigyopt.Prodigy(groups, use_bias_correction=True, d0=o.d0)
    return getattr(sf_torch, "ScheduleFreeWrapper" + form)(
        base, momentum=o.b1, r=o.r, weight_lr_power=o.weight_lr_power
    )


# Muon


@dataclasses.dataclass(frozen=True)
class Growing:
    """AMUSE's β as an option: a function of k for PyTorch and the reference."""

    b1: float
    steps: int
    rho: float

    def __call__(self, k: int) -> float:
        return reference_family.growing(self.b1, self.steps, self.rho)(k)


def _muon_reference(o: Any) -> Seams:
    return Seams(
        function(o.b1),
        reference.warmup(function(o.lr), o.warmup_steps),
        reference_family.Muon(
            o.b2,
            o.eps,
            o.weight_decay,
            o.decay_at,
            o.base_momentum,
            o.nesterov,
            o.row_b2,
        ),
        PolynomialAverage(o.r, o.weight_lr_power),
    )


def _rows_first(params: Any) -> Any:
    """What enters one output is a row, as in PyTorch; Flax has it in a column."""
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    return jax.tree.map(lambda p: numbers if p.ndim == 2 else None, params)


def _muon_jax(o: Any, store_x: bool) -> Any:
    b1 = o.b1
    if isinstance(b1, Growing):
        b1 = sf_jax.growing_b1(b1.b1, b1.steps, b1.rho)
    return sf_jax.schedule_free_muon(
        o.lr,
        o.warmup_steps,
        b1,
        o.b2,
        o.eps,
        o.weight_decay,
        o.weight_lr_power,
        r=o.r,
        momentum=o.base_momentum,
        row_b2=o.row_b2,
        decay_at=o.decay_at,
        store_x=store_x,
        nesterov=o.nesterov,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_rows_first,
    )


def _muon_torch(groups: list[Any], o: Any, form: str, foreach: bool) -> Any:
    (params,) = (group["params"] for group in groups)
    same = {"lr": o.lr, "eps": o.eps, "weight_decay": o.weight_decay}
    muon = sf_torch.Muon(
        [p for p in params if p.ndim == 2],
        momentum=o.base_momentum,
        nesterov=o.nesterov,
        adjust_lr_fn="match_rms_adamw",
        ns_dtype=None,
        row_b2=o.row_b2,
        **same,
    )
    rest = [p for p in params if p.ndim != 2]
    adamw = torch.optim.AdamW(rest, betas=(0.0, o.b2), foreach=foreach, **same)
    return getattr(sf_torch, "ScheduleFreeWrapper" + form)(
        sf_torch.Together(muon, adamw),
        momentum=o.b1,
        r=o.r,
        weight_lr_power=o.weight_lr_power,
    )


FAMILY = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            "plus",
            reference=_plus_reference,
            jax=_plus_jax,
            arguments=_plus_arguments,
            torch=_plus_torch,
            torch_forms=("", "Reference"),
        ),
        Optimizer(
            "refined",
            reference=_refined_reference,
            jax=_refined_jax,
            arguments=_refined_arguments,
            torch=_refined_torch,
            torch_forms=("",),
        ),
        Optimizer(
            "gpa",
            reference=_gpa_reference,
            jax=_gpa_jax,
            arguments=_gpa_arguments,
            torch=_gpa_torch,
            torch_forms=("",),
        ),
        Optimizer(
            "prodigy",
            reference=_prodigy_reference,
            jax=_prodigy_jax,
            arguments=_prodigy_arguments,
            torch=_prodigy_torch,
            torch_forms=("", "Reference"),
        ),
        Optimizer(
            "muon",
            reference=_muon_reference,
            jax=_muon_jax,
            arguments=lambda o: {"lr": o.lr},
            torch=_muon_torch,
            torch_forms=("", "Reference"),
        ),
    )
}

_PLUS: dict[str, Any] = {"lr": 1.0, "inner_momentum": 0.9, "b2": 0.95}
# As the golden files' ``meta`` has them.
_RECORDED: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 5.0, "c_warmup": 10, "lr": 0.5},
    {"b1_anneal_steps": 50, "r": 2.0, "b2": 0.99},
    {"polyak_beta": 0.9, "weight_decay": 1.0},
)
_GROWING = {**_PLUS, "b1_anneal_steps": 100, "c_warmup": 10, "r": 2.0}
_REFINED: dict[str, Any] = {"b1": 0.95, "refined_c": 50.0, "warmup_steps": 20}
_GPA: dict[str, Any] = {"b1": 0.7, "inner_momentum": 0.9}
_DECAY = {"weight_decay": 0.1}
_NETWORK: dict[str, Any] = {"tree": NETWORK, "gradients": "network"}
# At lr = 1 this small network's run is unstable: it magnifies rounding, in float64 too.
_PRODIGY: dict[str, Any] = {"lr": 0.3, "b2": 0.99}
# Where gradients do not depend on the weights: d grows 24 times in 300 steps.
_PRODIGY_STREAM = {"lr": 0.1, "b2": 0.9, "d0": 0.01}
# The matrices first, since Together has them in its first group.
_MATRICES: dict[str, Tree] = {
    "tree": {"tall": (8, 5), "wide": (4, 7), "vector": (6,), "scalar": ()}
}
# optax adds eps to the norm of m and torch takes the larger: too small for either.
_MUON: dict[str, Any] = {
    "base_momentum": 0.95,
    "b2": 0.95,
    "eps": 1e-30,
    "decay_at": "z",
}
_NORMUON = {**_MUON, "row_b2": 0.95}
# torch's AdamW multiplies by 1 - lr λ, whose rounding, where it is rounded, is the same
# at every step: 12 ulps after 300 at lr = 0.0025, λ = 0.1.
_EXACT_DECAY = {"lr": 2.0**-9, "weight_decay": 2.0**-3}

_Row = tuple[str, dict[str, Any], dict[str, Any]]  # name, options, fields of the case
_ROWS: list[_Row] = [
    ("plus/plain", _PLUS, {}),
    ("plus/decay", {**_PLUS, "weight_decay": 1.0, "lr": 0.5}, {}),
    ("plus/growing", _GROWING, {}),
    ("plus/polyak_beta", {**_PLUS, "polyak_beta": 0.9}, {}),
    (
        "plus/upstream",
        {**_PLUS, "polyak_beta": 0.9, "upstream_compatible": True},
        {},
    ),
    ("plus/bfloat16", {**_GROWING, **_DECAY, "lr": 0.1}, {"dtype": "bfloat16"}),
    ("plus/float64", {**_GROWING, **_DECAY}, {"dtype": "float64"}),
    ("refined/plain", _REFINED, {}),
    ("refined/decay_z", {**_REFINED, **_DECAY, "decay_at": "z"}, {}),
    ("refined/b1_schedule", {**_REFINED, "b1": Linear(0.7, 0.98)}, {}),
    ("refined/bfloat16", _REFINED, {"dtype": "bfloat16"}),
    ("refined/float64", {**_REFINED, **_DECAY}, {"dtype": "float64"}),
    ("gpa/plain", _GPA, {}),
    ("gpa/decay_z", {**_GPA, **_DECAY, "decay_at": "z", "warmup_steps": 20}, {}),
    ("gpa/decay_y", {**_GPA, **_DECAY, "b1": 0.9, "mu_x": 0.95}, {}),
    (
        "gpa/network",
        {**_GPA, **_DECAY, "decay_at": "z"},
        _NETWORK,
    ),
    ("gpa/bfloat16", {**_GPA, **_DECAY}, {"dtype": "bfloat16"}),
    ("gpa/float64", {**_GPA, **_DECAY}, {"dtype": "float64"}),
    ("prodigy/plain", _PRODIGY, _NETWORK),
    ("prodigy/stream", _PRODIGY_STREAM, {}),
    ("prodigy/warmup", {**_PRODIGY, "warmup_steps": 20}, _NETWORK),
    (
        "prodigy/together",
        {
            **_PRODIGY,
            **_DECAY,
            "lr": Linear(0.1, 0.3),
            "inner_momentum": 0.9,
            "r": 0.5,
        },
        _NETWORK,
    ),
    ("prodigy/bfloat16", _PRODIGY_STREAM, {"dtype": "bfloat16"}),
    ("prodigy/float64", {**_PRODIGY, **_DECAY}, {**_NETWORK, "dtype": "float64"}),
    ("muon/plain", _MUON, _MATRICES),
    ("muon/decay", {**_MUON, **_EXACT_DECAY, "r": 0.5}, _MATRICES),
    ("muon/lr_schedule", {**_MUON, "lr": Linear(0.0002, 0.005)}, _MATRICES),
    ("muon/growing", {**_MUON, "b1": Growing(0.8, 50, 0.7)}, _MATRICES),
    ("muon/nesterov", {**_MUON, "nesterov": True}, _MATRICES),
    ("muon/rows", _NORMUON, _MATRICES),
    ("muon/rows_decay", {**_NORMUON, **_EXACT_DECAY}, _MATRICES),
    ("muon/bfloat16", _NORMUON, {**_MATRICES, "dtype": "bfloat16"}),
    ("muon/float64", {**_NORMUON, **_DECAY}, {**_MATRICES, "dtype": "float64"}),
]
_GOLDEN: list[_Row] = [
    (
        f"plus/golden_{i}",
        {**_PLUS, "upstream_compatible": True, **options},
        {"dtype": "float64", "recorded": f"schedule_free_plus_{i}"},
    )
    for i, options in enumerate(_RECORDED)
]

FAMILY_CASES = [
    (name, FamilyOptions(**options), fields)
    for name, options, fields in (*_ROWS, *_GOLDEN)
]
