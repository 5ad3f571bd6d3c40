"""AdamW Schedule-Free as submitted to AlgoPerf again: as before, with decay at y, r = 0
and a float32 v."""

from parity_tests.registry.members import adamw_algoperf
from parity_tests.registry.optimizer import Optimizer, by_class
from parity_tests.registry.rows import cases

OPTIMIZER = Optimizer(
    "adamw_algoperf_v2",
    reference=lambda o: adamw_algoperf.in_reference(o, "y"),
    jax=adamw_algoperf.in_jax("algoperf_v2"),
    arguments=adamw_algoperf.arguments,
    torch=by_class("sf_torch", "AdamWScheduleFreeAlgoPerfV2"),
    options=adamw_algoperf.AlgoPerfOptions,
    torch_forms=("",),
)

CASES = cases(
    OPTIMIZER,
    ("entry", adamw_algoperf.ENTRY, {}),
)
