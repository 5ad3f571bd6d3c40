"""What may be different about a run that leaves the reference's trajectory."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes

from parity_tests.reference import Now, Seams
from parity_tests.registry import OPTIMIZERS
from parity_tests.runners.recorded_run import Group


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """Something that may be different about the recorded run.

    ``seams`` builds the optimizer that the run would then have followed, or None
    where it would be the same.
    """

    reason: str
    seams: Callable[[Group], Seams | None]
    x_is_y: bool = False
    narrow_state: bool = False

    def coarser(self, groups: Iterable[Group]) -> float:
        """How many times more than float32's the rounding is that may be expected."""
        if not self.narrow_state:
            return 1.0
        widest = max(float(ml_dtypes.finfo(group.z_dtype).eps) for group in groups)
        return widest / 2.0**-23


def plain(group: Group) -> Seams:
    seams = OPTIMIZERS[group.optimizer].reference(group.options)
    if hasattr(seams.base, "counts_apart"):
        seams.base.counts_apart = group.counts_apart
    return seams


def _with(optimizer: str | None = None, **changes: Any) -> Callable[[Group], Any]:
    """With other options, or as another optimizer."""

    def seams(group: Group) -> Seams | None:
        options = dataclasses.replace(group.options, **changes)
        other = dataclasses.replace(
            group, options=options, optimizer=optimizer or group.optimizer
        )
        needless = not group.options.weight_decay and "decay_at" in changes
        return None if other == group or needless else plain(other)

    return seams


def _variant(optimizer: str) -> Callable[[Group], Seams | None]:
    """Another place for the bias correction."""
    return lambda group: (
        _with(optimizer)(group) if group.optimizer.startswith("adamw") else None
    )


def _warmup(more: int = 0, shift: int = 0, average_shift: int | None = None) -> Any:
    """Warmup over more steps, or as if ``shift`` more steps had been taken."""

    def seams(group: Group) -> Seams | None:
        steps = group.options.warmup_steps
        if group.optimizer in ("radam", "wrapper") or not steps or steps + more < 0:
            return None
        changed = _with(warmup_steps=steps + more)(group) or plain(group)
        step_size, average = changed.step_size, changed.average
        of_average = shift if average_shift is None else average_shift
        seen = {}

        def shifted(now: Now) -> float:
            seen["lr"] = step_size(now._replace(k=now.k + of_average))
            return step_size(now._replace(k=now.k + shift))

        def weight(k: int, lr: float) -> float:
            return average(k, seen["lr"])

        weight.memory = average  # type: ignore[attr-defined]  # for whom sets its sums
        return changed._replace(step_size=shifted, average=weight)

    return seams


HYPOTHESES = (
    Hypothesis(
        "the warmup is shifted: lr · k / warmup_steps, which begins at 0",
        _warmup(shift=-1),
    ),
    Hypothesis(
        "the warmup is shifted: lr · (k + 2) / warmup_steps, one step ahead",
        _warmup(shift=1),
    ),
    Hypothesis("the warmup takes one step less than recorded", _warmup(more=-1)),
    Hypothesis("the warmup takes one step more than recorded", _warmup(more=1)),
    Hypothesis(
        "the warmup is optax.contrib's: it begins at 0, and the average sees the step "
        "size of the next step",
        _warmup(shift=-1, average_shift=0),
    ),
    Hypothesis("the weight decay is taken at y", _with(decay_at="y")),
    Hypothesis("the weight decay is taken at z", _with(decay_at="z")),
    Hypothesis("the weight decay is taken at x", _with(decay_at="x")),
    Hypothesis("there is no weight decay", _with(weight_decay=0.0)),
    Hypothesis(
        "the bias correction is the paper's: in the step size", _variant("adamw_paper")
    ),
    Hypothesis(
        "the bias correction is AlgoPerf's: in the step, not in the average",
        _variant("adamw_algoperf"),
    ),
    Hypothesis("the bias correction is in the denominator", _variant("adamw")),
    Hypothesis(
        "it was evaluated at y: the recorded x is y (optimizer.eval() was not called)",
        plain,
        x_is_y=True,
    ),
    # What bfloat16 arithmetic rounds to can't be replayed, only bounded.
    Hypothesis(
        "the state is bfloat16, which rounds this much",
        lambda group: plain(group) if group.z_dtype == "bfloat16" else None,
        narrow_state=True,
    ),
)
