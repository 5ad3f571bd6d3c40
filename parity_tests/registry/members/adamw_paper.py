"""AdamW Schedule-Free, with the bias correction in the step size."""

from parity_tests import reference
from parity_tests.registry.members import adamw
from parity_tests.registry.optimizer import Optimizer, by_class, seams, warmup
from parity_tests.registry.rows import BFLOAT16, FLOAT64, SEVERAL, cases, variations

OPTIMIZER = Optimizer(
    "adamw_paper",
    reference=lambda o: seams(
        o, adamw.base(o, "paper"), reference.paper_step_size(warmup(o), o.b2)
    ),
    jax=adamw.in_jax("paper"),
    arguments=adamw.arguments,
    torch=by_class("sf_torch", "AdamWScheduleFreePaper"),
    meta=by_class("schedulefree", "AdamWScheduleFreePaper"),
    torch_forms=("",),
    replays="AdamWScheduleFreePaper",
)

CASES = cases(
    OPTIMIZER,
    *variations(only={"warmup", "decay_y", "together"}),
    ("float64", SEVERAL, FLOAT64),
    ("bfloat16", SEVERAL, BFLOAT16),
)
