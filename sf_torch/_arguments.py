"""The arguments of the optimizers: one table of what each may be, and its check.

The errors, the table of the documentation and the fuzz of the tests are drawn from
:data:`ARGUMENTS`. Each error names the argument, quotes the value and says what would
be right.
"""

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DECAY_AT = ("y", "z", "x")
ROUNDINGS = ("nearest", "stochastic")


class Kind(NamedTuple):
    """What an argument may be."""

    accepts: str  # in words, after "must be"
    advice: str  # what it is, or what to give instead
    # The value as it is kept: a Python number for NumPy's. Raises what is no value of
    # this kind: TypeError by its type, ValueError by its size.
    read: Callable[[Any], Any]


def check(name: str, value: Any, kind: Kind | None = None) -> Any:
    """The value as it is to be kept.

    Raises:
      TypeError: a value of a type that the argument cannot have.
      ValueError: a value of that type which the argument cannot have.
    """
    kind = kind or ARGUMENTS[name]
    try:
        return kind.read(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"{name} must be {kind.accepts}, got {_shown(value)}. {kind.advice}"
        ) from None


def options(
    group: dict[str, Any],
    kinds: Mapping[str, Kind] | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Refuses what a parameter group cannot mean; what it can, becomes plain Python.

    Args:
      group: the options, which are written back as :func:`check` returns them.
      kinds: of the optimizer; :data:`ARGUMENTS` by default.
      names: the options to look at; by default all that have a kind.
    """
    kinds = kinds or ARGUMENTS
    for name in kinds if names is None else names:
        if name in group:
            group[name] = check(name, group[name], kinds[name])


# What reads a value


def _number(value: Any) -> float:
    """A Python or NumPy number as a float. A bool is none, though Python has it so."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    # Trainers that read their arguments from a command line pass 100.0.
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or value % 1 != 0:
        raise TypeError
    return int(value)  # type: ignore[call-overload]


def _numbers(
    low: float, high: float, advice: str, *, below: float | None = None
) -> Kind:
    """Numbers from low to high and below another number."""

    def read(value: Any) -> float:
        number = _number(value)
        if not low <= number <= high or (below is not None and number >= below):
            raise ValueError
        return number

    interval = f"[{low:g}, {high:g}{']' if below is None else ')'}"
    return Kind(f"a number in {interval}".replace("e+", "e"), advice, read)


def _whole_numbers(low: int, high: int, advice: str) -> Kind:
    """Whole numbers from low to high."""

    def read(value: Any) -> int:
        number = _whole(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return Kind(f"a whole number in [{low}, {high}]", advice, read)


def _or_tensor(kind: Kind) -> Kind:
    """A number, or a tensor of one, which may be written to between steps."""

    def read(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return kind.read(value)
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError
        if value.numel() != 1:
            raise ValueError
        kind.read(float(value))
        return value

    return kind._replace(
        accepts=f"{kind.accepts}, or a tensor that holds one", read=read
    )


def pair(first: Kind, second: Kind) -> Kind:
    """A tuple or list of two."""

    def read(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        a, b = value
        return first.read(a), second.read(b)

    accepts = f"a pair: {first.accepts}, and {second.accepts}"
    return Kind(accepts, "They are β and a decay rate: give (0.9, 0.999).", read)


def _one_of(*choices: Any) -> Kind:
    def read(value: Any) -> Any:
        if value is not None and not isinstance(value, str):
            raise TypeError
        if value not in choices:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(map(repr, choices))}", "Choose one.", read)


def _or_none(kind: Kind) -> Kind:
    def read(value: Any) -> Any:
        return None if value is None else kind.read(value)

    return kind._replace(accepts=f"None or {kind.accepts}", read=read)


def _boolean(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError
    return bool(value)


def _dtype(value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError
    if value not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError
    return value


def _coefficients(value: Any) -> tuple[float, float, float]:
    if not isinstance(value, (tuple, list)):
        raise TypeError
    a, b, c = map(_number, value)
    # What becomes of the singular values of a matrix whose norm is 1.
    for start in range(9):
        s = start / 8
        for _ in range(MOST_NS_STEPS):
            s = a * s + b * s**3 + c * s**5
            if not abs(s) < 100:
                raise ValueError
    return a, b, c


def _params(value: Any) -> Any:
    if isinstance(value, (Tensor, str, bytes)) or not isinstance(value, Iterable):
        raise TypeError
    return value


def _optimizer(value: Any) -> torch.optim.Optimizer:
    if not isinstance(value, torch.optim.Optimizer):
        raise TypeError
    return value


def _process_group(value: Any) -> Any:
    if not callable(getattr(value, "rank", None)):
        raise TypeError
    return value


def _shown(value: Any) -> str:
    """The value in an error, in one line and not too long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:97]}..."


# The kinds

LARGEST = 1e30
"""Of step sizes and the like: their product with a gradient still fits a float32."""
MOST_STEPS = 2**31 - 1
MOST_NS_STEPS = 99

INTERPOLATION = _numbers(
    0, 1, "It is the weight of one average in another (β, usually 0.9 to 0.98)."
)
DECAY_RATE = _numbers(
    0, 1, "It is the decay rate of a moving average (usually 0.9 to 0.999).", below=1
)
STEP_SIZE = _or_tensor(
    _numbers(
        0,
        LARGEST,
        "It is the step size: give its magnitude. Parameters with another step size "
        "are a group of their own.",
    )
)
FACTOR = _numbers(
    1 / LARGEST,
    LARGEST,
    "It is a factor on a step size that is found, 1 unless you know better.",
)
MAGNITUDE = _numbers(0, LARGEST, "Give its magnitude.")
FLOOR = _numbers(
    -LARGEST,
    LARGEST,
    "It is the least loss thought possible; a group holds its present value.",
)
FLOOR = FLOOR._replace(accepts=f"{FLOOR.accepts} or a function of k that gives one")
POWER = _numbers(
    -1e15, 1e15, "It is the power with which steps are weighed, usually 0 to 2."
)
STEPS = _whole_numbers(
    0,
    MOST_STEPS,
    "It counts steps, 0 for none; for a share of the run, give that share times the "
    "number of its steps.",
)
ESTIMATE = _numbers(
    1e-12,
    1e6,
    "Prodigy multiplies its estimates, and the first of them is best left at 1e-6.",
)
BOOLEAN = Kind(
    "True or False",
    "If this value was meant for another argument, give both by name: the order of "
    "arguments may differ between versions of schedulefree.",
    _boolean,
)
DTYPE = _or_none(
    Kind(
        "a floating dtype of 16 bits or more",
        "Leave it out to keep the state at least in float32.",
        _dtype,
    )
)

ARGUMENTS: dict[str, Kind] = {
    "params": Kind(
        "parameters or groups of them",
        "Give model.parameters(), or a list.",
        _params,
    ),
    "base": Kind(
        "a torch optimizer",
        "Build it first: ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1)).",
        _optimizer,
    ),
    "lr": STEP_SIZE,
    "adam_lr": _or_none(STEP_SIZE),
    "momentum": INTERPOLATION,
    "betas": pair(INTERPOLATION, DECAY_RATE),
    "inner_momentum": DECAY_RATE,
    "row_b2": _or_none(DECAY_RATE),
    "eps": MAGNITUDE,
    "weight_decay": MAGNITUDE,
    "weight_decay_at_x": MAGNITUDE,
    "weight_decay_at_y": MAGNITUDE,
    "warmup_steps": STEPS,
    "r": POWER,
    "weight_lr_power": POWER,
    "refined_c": MAGNITUDE,
    "b1": INTERPOLATION,
    "steps": _whole_numbers(2, MOST_STEPS, "β begins to grow after them."),
    "rho": MAGNITUDE,
    "mu_y": INTERPOLATION,
    "mu_x": INTERPOLATION,
    "sf_beta1": INTERPOLATION,
    "sf_beta1_anneal_steps": STEPS,
    "sf_beta1_max": DECAY_RATE,
    "polyak_beta": DECAY_RATE,
    "c_warmup": STEPS,
    "loss_floor": FLOOR,
    "estim_lr0": ESTIMATE,
    "estim_lr_coef": ESTIMATE,
    "beta3": _or_none(DECAY_RATE),
    "safeguard_warmup": BOOLEAN,
    "variant": _one_of("standard", "algoperf"),
    "nesterov": BOOLEAN,
    "ns_coefficients": Kind(
        "three numbers that keep the iteration bounded",
        "Leave them out for Muon's own.",
        _coefficients,
    ),
    "ns_steps": _whole_numbers(
        0, MOST_NS_STEPS, "It counts iterations of Newton-Schulz, usually 5."
    ),
    "ns_dtype": DTYPE,
    "adjust_lr_fn": _one_of(None, "original", "match_rms_adamw"),
    "decay_at": _one_of(*DECAY_AT),
    "decay_at_z": BOOLEAN,
    "state_dtype": DTYPE,
    "moment_dtype": DTYPE,
    "rounding": _one_of(*ROUNDINGS),
    "seed": _whole_numbers(0, 2**32 - 1, "It is the key of the random bits."),
    "every": _whole_numbers(
        1, MOST_STEPS, "It counts the steps from one recorded y and x to the next."
    ),
    "foreach": _or_none(BOOLEAN),
    "fused": _or_none(BOOLEAN),
    "capturable": BOOLEAN,
    "store_x": BOOLEAN,
    "silent_sgd_phase": BOOLEAN,
    "upstream_compatible": BOOLEAN,
    "skip_nonfinite": BOOLEAN,
    "process_group": _or_none(
        Kind(
            "a process group of torch.distributed",
            "Give what torch.distributed.new_group returned.",
            _process_group,
        )
    ),
}
OF_MUON = {**ARGUMENTS, "momentum": DECAY_RATE}
OF_MOMENTS = {**ARGUMENTS, "betas": pair(DECAY_RATE, DECAY_RATE)}
OF_PRODIGY = {**ARGUMENTS, "lr": MAGNITUDE}
