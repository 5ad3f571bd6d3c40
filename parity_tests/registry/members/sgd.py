"""SGD Schedule-Free."""

from typing import Any

from optax import contrib

import sf_jax
from parity_tests import reference
from parity_tests.registry.optimizer import (
    Optimizer,
    by_class,
    changed,
    pick,
    seams,
    warmup,
)
from parity_tests.registry.options import Options
from parity_tests.registry.rows import (
    BFLOAT16,
    FLOAT64,
    IN_GROUPS,
    MISSING,
    OF_THE_RULE,
    ON_NETWORK,
    SEVERAL,
    cases,
    variations,
)


def _arguments(o: Options) -> dict[str, Any]:
    same = pick(o, "lr weight_decay warmup_steps r weight_lr_power")
    return {**same, "momentum": o.b1, **changed(o, "decay_at")}


OPTIMIZER = Optimizer(
    "sgd",
    reference=lambda o: seams(o, reference.SGD(o.weight_decay, o.decay_at), warmup(o)),
    jax=lambda o, store_x: sf_jax.schedule_free_sgd(
        o.lr,
        o.warmup_steps,
        **pick(o, "b1 weight_decay weight_lr_power r decay_at"),
        store_x=store_x,
    ),
    arguments=_arguments,
    torch=by_class("sf_torch", "SGDScheduleFree"),
    meta=by_class("schedulefree", "SGDScheduleFree"),
    optax=lambda o: contrib.schedule_free_sgd(
        o.lr, o.warmup_steps or None, **pick(o, "b1 weight_decay weight_lr_power")
    ),
    lacks={"meta": {"decay_at=z": "its SGD decays at y"}},
    replays="SGDScheduleFree",
)

CASES = cases(
    OPTIMIZER,
    *variations(lacks={"b2"}, without=OF_THE_RULE),
    ("float64", SEVERAL, FLOAT64),
    ("bfloat16", SEVERAL, BFLOAT16),
    ("network", SEVERAL, ON_NETWORK),
    ("groups", SEVERAL, IN_GROUPS),
    ("missing", SEVERAL, MISSING),
    thorough={"together"},
    lr=0.01,
)
