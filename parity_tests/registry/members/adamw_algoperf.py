"""AdamW Schedule-Free as submitted to AlgoPerf: lr_k >= eps, decay by default at x."""

import dataclasses

from parity_tests import reference
from parity_tests.registry.members import adamw
from parity_tests.registry.optimizer import Optimizer, by_class, seams, warmup
from parity_tests.registry.options import Options
from parity_tests.registry.rows import BFLOAT16, FLOAT64, SEVERAL, cases, variations


def _reference(o: Options) -> reference.Seams:
    # Options say "y" where a case says nothing, and this variant's default is x.
    decay_at = "x" if o.decay_at == "y" else o.decay_at
    base = adamw.base(dataclasses.replace(o, decay_at=decay_at), "algoperf")
    return seams(o, base, reference.at_least(warmup(o), o.eps))


OPTIMIZER = Optimizer(
    "adamw_algoperf",
    reference=_reference,
    jax=adamw.in_jax("algoperf"),
    arguments=adamw.arguments,
    torch=by_class("sf_torch", "AdamWScheduleFreeAlgoPerf"),
    torch_forms=("",),
)

CASES = cases(
    OPTIMIZER,
    *variations(only={"warmup", "decay_z", "together"}),
    ("float64", SEVERAL, FLOAT64),
    ("bfloat16", SEVERAL, BFLOAT16),
    (
        "golden_0",
        {
            "b2": 0.9955159689799007,
            "weight_decay": 0.08121616522670176,
            "warmup_steps": 20,
            "r": 0.75,
        },
        {**FLOAT64, "recorded": "algoperf_adamw_0"},
    ),
)
