"""AdamW Schedule-Free as first submitted to AlgoPerf: lr_k >= eps, decay by default at
x, and a v that the entry kept in bfloat16."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import torch

import sf_jax
from parity_tests import reference
from parity_tests.registry.members import adamw
from parity_tests.registry.optimizer import (
    Optimizer,
    by_class,
    changed,
    pick,
    seams,
    warmup,
)
from parity_tests.registry.options import Options
from parity_tests.registry.rows import BFLOAT16, FLOAT64, SEVERAL, cases, variations


@dataclasses.dataclass(frozen=True)
class AlgoPerfOptions(Options):
    """Adds whether v is kept in bfloat16, as PyTorch's in-place operations round it."""

    narrow_v: bool = False


def in_reference(o: AlgoPerfOptions, decay_at: str) -> reference.Seams:
    """The seams of either entry; ``decay_at`` where the options say nothing."""
    # Options say "y" where a case says nothing.
    at = decay_at if o.decay_at == "y" else o.decay_at
    adam = reference.InPlaceAdamW if o.narrow_v else reference.AdamW
    base = adam(o.b2, o.eps, o.weight_decay, at, o.inner_momentum, "algoperf")
    return seams(o, base, reference.at_least(warmup(o), o.eps))


def in_jax(variant: str) -> Any:
    """Builds either entry in sf_jax."""
    names = "b1 b2 eps weight_decay weight_lr_power r inner_momentum"
    return lambda o, store_x: sf_jax.schedule_free_adamw(
        o.lr,
        o.warmup_steps,
        **pick(o, names),
        **changed(o, "decay_at"),
        store_x=store_x,
        variant=variant,
        moment_dtype=jnp.bfloat16 if o.narrow_v else None,
    )


def arguments(o: AlgoPerfOptions) -> dict[str, Any]:
    """The arguments of a group in PyTorch."""
    moment_dtype = torch.bfloat16 if o.narrow_v else None
    return {**adamw.arguments(o), "moment_dtype": moment_dtype}


OPTIMIZER = Optimizer(
    "adamw_algoperf",
    reference=lambda o: in_reference(o, "x"),
    jax=in_jax("algoperf"),
    arguments=arguments,
    torch=by_class("sf_torch", "AdamWScheduleFreeAlgoPerf"),
    options=AlgoPerfOptions,
    torch_forms=("",),
)

# The hyperparameters of both entries, but for a warmup that ends within the run.
ENTRY: dict[str, Any] = {
    "b2": 0.9955159689799007,
    "weight_decay": 0.08121616522670176,
    "warmup_steps": 20,
}
NARROW_V: dict[str, Any] = {**ENTRY, "r": 0.75, "narrow_v": True}

CASES = cases(
    OPTIMIZER,
    *variations(only={"decay_z", "together"}),
    ("float64", SEVERAL, FLOAT64),
    ("narrow_v", NARROW_V, {}),
    ("narrow_v_bfloat16", NARROW_V, BFLOAT16),
    (
        "golden_0",
        {**ENTRY, "r": 0.75},
        {**FLOAT64, "recorded": "algoperf_adamw_0"},
    ),
)
