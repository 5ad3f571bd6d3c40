"""GPA over AdamW, with the decay of its paper."""

import dataclasses
from typing import Any

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer, pick, warmup
from parity_tests.registry.options import Options, function
from parity_tests.registry.rows import BFLOAT16, DECAY, FLOAT64, ON_NETWORK, cases


@dataclasses.dataclass(frozen=True)
class GPAOptions(Options):
    """Adds μ_x, the weight of x in its average. μ_y is ``b1``."""

    mu_x: float = 0.99


def _reference(o: GPAOptions) -> reference.Seams:
    return reference.Seams(
        function(o.b1),
        warmup(o),
        reference.AdamW(o.b2, o.eps, o.weight_decay, o.decay_at, o.inner_momentum),
        reference.exponential(o.mu_x),
    )


def _jax(o: GPAOptions, store_x: bool) -> Any:
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


def _arguments(o: GPAOptions) -> dict[str, Any]:
    same = pick(o, "lr mu_x eps weight_decay warmup_steps decay_at")
    return {**same, "mu_y": o.b1, "betas": (o.inner_momentum, o.b2)}


def _torch(groups: list[Any], o: GPAOptions, form: str, foreach: bool) -> Any:
    return sf_torch.GPAAdamW(groups, foreach=foreach)


OPTIMIZER = Optimizer(
    "gpa",
    reference=_reference,
    jax=_jax,
    arguments=_arguments,
    torch=_torch,
    options=GPAOptions,
    torch_forms=("",),
    replays="GPAAdamW",
)

CASES = cases(
    OPTIMIZER,
    ("plain", {}, {}),
    ("decay_z", {**DECAY, "decay_at": "z", "warmup_steps": 20}, {}),
    ("decay_y", {**DECAY, "b1": 0.9, "mu_x": 0.95}, {}),
    ("network", {**DECAY, "decay_at": "z"}, ON_NETWORK),
    ("bfloat16", DECAY, BFLOAT16),
    ("float64", DECAY, FLOAT64),
    b1=0.7,
    inner_momentum=0.9,
)
