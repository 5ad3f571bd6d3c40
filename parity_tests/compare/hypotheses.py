"""Hypotheses: reasons for which a recorded run may differ from the reference."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes

from parity_tests.reference import Now, Seams
from parity_tests.registry import OPTIMIZERS
from parity_tests.registry.options import Options
from parity_tests.runners.recorded_run import Group


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One reason for which the recorded run may differ.

    ``seams`` builds the reference as the run would then have followed it. It returns
    None where the hypothesis changes nothing.
    """

    reason: str
    seams: Callable[[Group], Seams | None]
    x_is_y: bool = False  # y was evaluated in place of x
    narrow_state: bool = False  # the state is in a dtype below float32

    def coarser(self, groups: Iterable[Group]) -> float:
        """The expected rounding as a multiple of float32's."""
        if not self.narrow_state:
            return 1.0
        widest = max(float(ml_dtypes.finfo(group.z_dtype).eps) for group in groups)
        return widest / 2.0**-23


def plain(group: Group) -> Seams:
    """The seams that the recorded options ask for."""
    seams = OPTIMIZERS[group.optimizer].reference(group.options)
    if hasattr(seams.base, "counts_apart"):
        seams.base.counts_apart = group.counts_apart
    return seams


def _with(optimizer: str | None = None, **changes: Any) -> Callable[[Group], Any]:
    """Seams with other options, or of another optimizer."""

    def seams(group: Group) -> Seams | None:
        options = dataclasses.replace(group.options, **changes)
        if optimizer:
            options = _options_of(optimizer, options)
        other = dataclasses.replace(
            group, options=options, optimizer=optimizer or group.optimizer
        )
        needless = not group.options.weight_decay and "decay_at" in changes
        return None if other == group or needless else plain(other)

    return seams


def _options_of(optimizer: str, options: Options) -> Options:
    """The same options for another optimizer; what only it has is at its default."""
    kind: Any = OPTIMIZERS[optimizer].options  # a dataclass
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{n: v for n, v in vars(options).items() if n in names})


def _variant(optimizer: str) -> Callable[[Group], Seams | None]:
    """Seams of another variant of AdamW, which differs in its bias correction."""
    return lambda group: (
        _with(optimizer)(group) if group.optimizer.startswith("adamw") else None
    )


def _warmup(more: int = 0, shift: int = 0, average_shift: int | None = None) -> Any:
    """Seams with ``more`` steps of warmup, or a warmup that is ``shift`` steps ahead.

    ``average_shift`` is that of the step size which the average sees, if it differs.
    """

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

        weight.memory = average  # type: ignore[attr-defined]  # replay sets its sums
        return changed._replace(step_size=shifted, average=weight)

    return seams


def as_recorded(
    recorded: Iterable[Group], differing: Mapping[str, Any]
) -> list[Hypothesis]:
    """For each setting that differs: that it alone, or with the rest, is the reason."""
    before = {group.names: group.options for group in recorded}

    def back(names: Iterable[str]) -> Callable[[Group], Seams]:
        def seams(group: Group) -> Seams:
            options = {name: getattr(before[group.names], name) for name in names}
            changed = dataclasses.replace(group.options, **options)
            return plain(dataclasses.replace(group, options=changed))

        return seams

    found = [
        Hypothesis(f"{name} is {value}, as recorded", back([name]))
        for name, value in differing.items()
    ]
    if len(found) > 1:
        names = ", ".join(differing)
        found.append(Hypothesis(f"{names} are as recorded", back(list(differing))))
    return found


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
    # Rounding to bfloat16 cannot be replayed. Its size can be bounded.
    Hypothesis(
        "the state is bfloat16, which rounds this much",
        lambda group: plain(group) if group.z_dtype == "bfloat16" else None,
        narrow_state=True,
    ),
)
