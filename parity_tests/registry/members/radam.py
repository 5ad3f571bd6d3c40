"""RAdam Schedule-Free."""

from typing import Any

import sf_jax
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer, by_class, pick, seams
from parity_tests.registry.options import Options, function
from parity_tests.registry.rows import (
    BFLOAT16,
    DECAY,
    FLOAT64,
    OF_THE_RULE,
    ON_NETWORK,
    SEVERAL,
    cases,
    variations,
)


def _arguments(o: Options) -> dict[str, Any]:
    same = pick(o, "lr eps weight_decay r weight_lr_power silent_sgd_phase")
    return {**same, "betas": (o.b1, o.b2)}


OPTIMIZER = Optimizer(
    "radam",
    reference=lambda o: seams(
        o,
        reference.RAdam(o.b2, o.eps, o.weight_decay),
        reference.rectified(function(o.lr), o.b2, o.silent_sgd_phase),
    ),
    jax=lambda o, store_x: sf_jax.schedule_free_radam(
        o.lr,
        **pick(o, "b1 b2 eps weight_decay weight_lr_power r silent_sgd_phase"),
        store_x=store_x,
    ),
    arguments=_arguments,
    torch=by_class("sf_torch", "RAdamScheduleFree"),
    meta=by_class("schedulefree", "RAdamScheduleFree"),
    replays="RAdamScheduleFree",
)

_LOUD = {"silent_sgd_phase": False}
CASES = cases(
    OPTIMIZER,
    *variations(
        lacks={"warmup_steps", "decay_at"},
        without={*OF_THE_RULE, "b1_0", "b1_schedule"},
    ),
    ("loud", _LOUD, {}),
    ("loud_power_0", {**_LOUD, **DECAY, "weight_lr_power": 0.0}, {}),
    ("float64", SEVERAL, FLOAT64),
    ("bfloat16", SEVERAL, BFLOAT16),
    ("network", SEVERAL, ON_NETWORK),
    thorough={"together"},
)
