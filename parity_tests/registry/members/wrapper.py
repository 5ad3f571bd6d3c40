"""Schedule-Free wrapped around SGD, with or without momentum."""

import importlib
from collections.abc import Callable
from typing import Any

import optax
import torch
from optax import GradientTransformation

import sf_jax
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer, pick, seams
from parity_tests.registry.options import Options, function
from parity_tests.registry.rows import (
    BFLOAT16,
    DECAY,
    FLOAT64,
    OF_THE_RULE,
    cases,
    variations,
)


def _wrapped(package: str) -> Callable[..., Any]:
    def build(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
        module = importlib.import_module(package)
        return getattr(module, "ScheduleFreeWrapper" + form)(
            torch.optim.SGD(groups, foreach=foreach),
            momentum=o.b1,
            weight_decay_at_y=o.weight_decay,
            **pick(o, "r weight_lr_power"),
        )

    return build


def _jax(o: Options, store_x: bool) -> GradientTransformation:
    base = optax.sgd(o.lr, o.base_momentum or None)
    if o.weight_decay:
        # Decay follows the momentum; it is at y, which the rule gives as params.
        decay = optax.add_decayed_weights(o.weight_decay)
        trace = optax.trace(o.base_momentum) if o.base_momentum else optax.identity()
        base = optax.chain(trace, decay, optax.scale_by_learning_rate(o.lr))
    return sf_jax.schedule_free(
        base, o.lr, o.b1, o.weight_lr_power, r=o.r, store_x=store_x
    )


OPTIMIZER = Optimizer(
    "wrapper",
    reference=lambda o: seams(
        o,
        reference.SGD(o.weight_decay, momentum=o.base_momentum),
        reference.warmup(function(o.lr), 0),
    ),
    jax=_jax,
    arguments=lambda o: {"lr": o.lr, "momentum": o.base_momentum},
    torch=_wrapped("sf_torch"),
    meta=_wrapped("schedulefree"),
    torch_forms=("", "Reference", "Closure"),
    fuses=False,
    lacks={
        "meta": {
            "scalar": "its exchange of y and z fails on a tensor of 0 dimensions",
            "empty": "its exchange of y and z fails on an empty tensor",
        }
    },
    replays="ScheduleFreeWrapper",
)

# Leaves on which Meta's wrapper does not fail.
_PLAIN: dict[str, Any] = {"tree": {"matrix": (6, 7), "one": (1,)}}
_MOMENTUM = {"base_momentum": 0.5}
CASES = cases(
    OPTIMIZER,
    *variations(
        lacks={"warmup_steps", "decay_at", "b2"},
        without={*OF_THE_RULE, "b1_0", "b1_schedule"},
        **_PLAIN,
    ),
    ("momentum", _MOMENTUM, _PLAIN),
    ("momentum_decay", {**_MOMENTUM, **DECAY}, _PLAIN),
    ("float64", {**_MOMENTUM, **DECAY}, FLOAT64),
    ("bfloat16", {**_MOMENTUM, **DECAY}, BFLOAT16),
    lr=0.01,
)
