"""AdamW Schedule-Free. Its paper and AlgoPerf variants build on what stands here."""

from collections.abc import Callable
from typing import Any

from optax import GradientTransformation, contrib

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
from parity_tests.registry.options import Linear, Options
from parity_tests.registry.rows import (
    BFLOAT16,
    DECAY,
    FLOAT64,
    IN_GROUPS,
    MISSING,
    ON_NETWORK,
    SEVERAL,
    cases,
    variations,
)


def base(o: Options, variant: str = "standard") -> reference.AdamW:
    """The reference's base step."""
    return reference.AdamW(
        o.b2, o.eps, o.weight_decay, o.decay_at, o.inner_momentum, variant
    )


def in_jax(variant: str) -> Callable[[Options, bool], GradientTransformation]:
    """Builds a variant in sf_jax."""
    names = "b1 b2 eps weight_decay weight_lr_power r inner_momentum"
    return lambda o, store_x: sf_jax.schedule_free_adamw(
        o.lr,
        o.warmup_steps,
        **pick(o, names),
        **changed(o, "decay_at"),
        store_x=store_x,
        variant=variant,
    )


def arguments(o: Options) -> dict[str, Any]:
    """The arguments of a group in PyTorch, the same for every variant."""
    same = pick(o, "lr eps weight_decay warmup_steps r weight_lr_power")
    return {**same, "betas": (o.b1, o.b2), **changed(o, "decay_at inner_momentum")}


def _meta(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
    import schedulefree

    if o.decay_at == "z":  # Only Meta's Reference form decays at z.
        groups = [{k: v for k, v in g.items() if k != "decay_at"} for g in groups]
        return schedulefree.AdamWScheduleFreeReference(
            groups, decay_at_z=True, foreach=foreach
        )
    return schedulefree.AdamWScheduleFree(groups, foreach=foreach)


OPTIMIZER = Optimizer(
    "adamw",
    reference=lambda o: seams(o, base(o), warmup(o)),
    jax=in_jax("standard"),
    arguments=arguments,
    torch=by_class("sf_torch", "AdamWScheduleFree"),
    meta=_meta,
    optax=lambda o: contrib.schedule_free_adamw(
        o.lr,
        o.warmup_steps or None,
        **pick(o, "b1 b2 eps weight_decay weight_lr_power"),
    ),
    lacks={
        "meta": {"missing gradients": "corrects bias by the group's count of steps"}
    },
    replays="AdamWScheduleFree",
)

_TURNING = {"b1": Linear(0.7, 0.98)}
CASES = cases(
    OPTIMIZER,
    *variations(),
    ("inner_momentum", {"inner_momentum": 0.9}, {}),
    (
        "inner_momentum_decay",
        {**DECAY, "inner_momentum": 0.8, "b1": 0.95, "warmup_steps": 20},
        {},
    ),
    ("float64", SEVERAL, FLOAT64),
    ("bfloat16", SEVERAL, BFLOAT16),
    ("network", SEVERAL, ON_NETWORK),
    ("groups", SEVERAL, IN_GROUPS),
    ("missing", SEVERAL, MISSING),
    ("complex", SEVERAL, {"is_complex": True}),
    ("b1_schedule_missing", _TURNING, MISSING),
    ("b1_schedule_bfloat16", _TURNING, BFLOAT16),
    ("b1_schedule_float64", _TURNING, FLOAT64),
    (
        "golden_0",
        {"lr": 0.01, "inner_momentum": 0.9},
        {**FLOAT64, "recorded": "adamw_inner_momentum_0"},
    ),
    (
        "golden_1",
        {
            **DECAY,
            "lr": 0.003,
            "inner_momentum": 0.8,
            "warmup_steps": 15,
            "b1": 0.95,
            "b2": 0.99,
            "r": 0.5,
        },
        {**FLOAT64, "recorded": "adamw_inner_momentum_1"},
    ),
    thorough={"together", "b1_schedule", "bfloat16"},
)
