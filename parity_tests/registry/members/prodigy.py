"""Schedule-Free around Prodigy.

Meta's package is not compared: its wrapper and the authors' PyTorch Prodigy both count
steps in the group's ``k``, which then advances by two at every step.
"""

import dataclasses
from typing import Any

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer, pick, warmup
from parity_tests.registry.options import Linear, Options, function
from parity_tests.registry.rows import BFLOAT16, DECAY, FLOAT64, ON_NETWORK, cases


@dataclasses.dataclass(frozen=True)
class ProdigyOptions(Options):
    """Adds d0, the first estimate of the distance to the solution, and how d grows."""

    d0: float = 1e-3
    beta3: float | None = None
    safeguard_warmup: bool = False
    variant: str = "standard"


def _reference(o: ProdigyOptions) -> reference.Seams:
    options = (o.inner_momentum, o.b2, o.eps, o.weight_decay, o.d0, o.beta3)
    base = reference.Prodigy(*options, o.safeguard_warmup)
    if o.variant == "algoperf":
        base = reference.AlgoPerfProdigy(*options)
    average = reference.PolynomialAverage(o.r, o.weight_lr_power)
    return reference.Seams(
        function(o.b1), warmup(o), base, reference.weighed_by_d(average, base)
    )


def _jax(o: ProdigyOptions, store_x: bool) -> Any:
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
        beta3=o.beta3,
        safeguard_warmup=o.safeguard_warmup,
        variant=o.variant,
        store_x=store_x,
    )


def _torch(groups: list[Any], o: ProdigyOptions, form: str, foreach: bool) -> Any:
    return sf_torch.ProdigyScheduleFree(
        groups,
        betas=(o.b1, o.b2),  # type: ignore[arg-type]  # b1 is a number in PyTorch
        estim_lr0=o.d0,
        **pick(o, "eps weight_decay warmup_steps r weight_lr_power inner_momentum"),
        **pick(o, "beta3 safeguard_warmup variant"),
    )


OPTIMIZER = Optimizer(
    "prodigy",
    reference=_reference,
    jax=_jax,
    arguments=lambda o: {"lr": o.lr},
    torch=_torch,
    options=ProdigyOptions,
    needs={"sf_torch": "prodigyopt"},
    torch_forms=("",),
    fuses=False,
)

# At lr = 1 the network's run is unstable: it magnifies rounding, in float64 too.
_STABLE: dict[str, Any] = {"lr": 0.3, "b2": 0.99}
# For gradients that do not depend on the weights. d grows 24 times in 300 steps.
_STREAM: dict[str, Any] = {"lr": 0.1, "b2": 0.9, "d0": 0.01}
# The averaging of the entry, which the packages have by default beside its variant.
_ENTRY: dict[str, Any] = {
    **_STREAM,
    "variant": "algoperf",
    "r": 0.75,
    "weight_lr_power": 0.0,
    "warmup_steps": 20,
}
CASES = cases(
    OPTIMIZER,
    ("plain", _STABLE, ON_NETWORK),
    ("stream", _STREAM, {}),
    (
        "together",
        {**_STABLE, **DECAY, "lr": Linear(0.1, 0.3), "inner_momentum": 0.9, "r": 0.5},
        ON_NETWORK,
    ),
    (
        "safeguard",
        {**_STABLE, "warmup_steps": 20, "beta3": 0.98, "safeguard_warmup": True},
        ON_NETWORK,
    ),
    ("algoperf", {**_ENTRY, **DECAY}, {}),
    ("bfloat16", _STREAM, BFLOAT16),
    ("float64", {**_STABLE, **DECAY}, {**ON_NETWORK, **FLOAT64}),
)
