"""The arguments of the optimizers: one table of what each may be, and its check.

The errors, the table of the documentation and the fuzz of the tests are drawn from
:data:`ARGUMENTS`. Each error names the argument, quotes the value and says what would
be right.
"""

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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


def dtypes(params: list[Tensor]) -> None:
    """Refuses parameters that are to move and cannot be averaged."""
    for p in params:
        if not (p.is_floating_point() or p.is_complex()):
            raise ValueError(
                f"a parameter with a gradient has dtype {p.dtype}, which cannot be "
                "averaged. Leave it out of the optimizer, or without a gradient."
            )


def random_rounding(group: Mapping[str, Any]) -> None:
    """Refuses random rounding where it cannot be."""
    if group.get("rounding") != "stochastic":
        return
    if "seed" not in group:
        raise ValueError(
            'rounding="stochastic" is an option of SGD, AdamW, RAdam and GPA, and of '
            "no other optimizer. Leave rounding out."
        )
    if group["state_dtype"] != torch.bfloat16:
        raise ValueError(
            'rounding="stochastic" is to bfloat16, got state_dtype='
            f"{group['state_dtype']}. Pass state_dtype=torch.bfloat16, or leave "
            "rounding out."
        )
    for option in ("fused", "capturable"):
        if group[option]:
            raise ValueError(
                f'rounding="stochastic" does not go with {option}=True: the kernel '
                f"rounds to nearest. Leave {option} out."
            )
    for p in group["params"]:
        if hasattr(p, "to_local"):
            raise ValueError(
                'rounding="stochastic" needs whole parameters, got a distributed one '
                f"of shape {tuple(p.shape)}: the random bits go by the place of an "
                "element in the whole. Leave rounding out."
            )


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


def _boolean(value: Any) -> bool:
    # NumPy's is not Python's, and torch must not be asked for NumPy's.
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError
    return bool(value)


def _within(
    read: Callable[[Any], Any], low: float, high: float, below: float | None = None
) -> Callable[[Any], Any]:
    """As ``read``, for numbers from low to high and below another number."""

    def within(value: Any) -> Any:
        number = read(value)
        if not low <= number <= high or (below is not None and number >= below):
            raise ValueError
        return number

    return within


def _step_size(value: Any) -> Any:
    """A tensor stays what it is, so that it may be written to between steps."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError
        if value.numel() != 1:
            raise ValueError
        STEP_SIZE.read(float(value))
        return value
    return _within(_number, 0, LARGEST)(value)


def _dtype(value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError
    if value not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError
    return value


def pair(value: Any) -> tuple[Any, Any]:
    """The two parts of a tuple or list."""
    if not isinstance(value, (tuple, list)):
        raise TypeError
    first, second = value
    return first, second


def _betas(value: Any) -> tuple[float, float]:
    b1, b2 = pair(value)
    return INTERPOLATION.read(b1), DECAY_RATE.read(b2)


def _decay_rates(value: Any) -> tuple[float, float]:
    b1, b2 = _betas(value)
    return DECAY_RATE.read(b1), b2


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
MOST_NS_STEPS = 99

PARAMS = Kind(
    "parameters or groups of them",
    "Give model.parameters(), or a list.",
    _params,
)
BASE = Kind(
    "a torch optimizer",
    "Build it first: ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1)).",
    _optimizer,
)
INTERPOLATION = Kind(
    "a number in [0, 1]",
    "It is the weight of one average in another (β, usually 0.9 to 0.98).",
    _within(_number, 0, 1),
)
DECAY_RATE = Kind(
    "a number in [0, 1)",
    "It is the decay rate of a moving average (usually 0.9 to 0.999).",
    _within(_number, 0, 1, below=1),
)
BETAS = Kind(
    "a pair of numbers, the first in [0, 1], the second in [0, 1)",
    "They are β, the weight of x in y, and a decay rate: give (0.9, 0.999).",
    _betas,
)
DECAY_RATES = Kind(
    "a pair of numbers in [0, 1)",
    "They are the decay rates of moving averages: give (0.9, 0.95).",
    _decay_rates,
)
STEP_SIZE = Kind(
    "a number in [0, 1e30], or a tensor that holds one",
    "It is the step size: give its magnitude. Parameters with another step size are a "
    "group of their own.",
    _step_size,
)
FACTOR = Kind(
    "a number in [1e-30, 1e30]",
    "It is a factor on a step size that is found, 1 unless you know better.",
    _within(_number, 1e-30, LARGEST),
)
MAGNITUDE = Kind(
    "a number in [0, 1e30]", "Give its magnitude.", _within(_number, 0, LARGEST)
)
FLOOR = Kind(
    "a number in [-1e30, 1e30] or a function of k that gives one",
    "It is the least loss thought possible; a group holds its present value.",
    _within(_number, -LARGEST, LARGEST),
)
PROCESS_GROUP = Kind(
    "a process group of torch.distributed",
    "Give what torch.distributed.new_group returned.",
    _process_group,
)
POWER = Kind(
    "a number in [-1e15, 1e15]",
    "It is the power with which steps are weighed, usually 0 to 2.",
    _within(_number, -1e15, 1e15),
)
STEPS = Kind(
    "a whole number in [0, 2147483647]",
    "It counts steps, 0 for none; for a share of the run, give that share times the "
    "number of its steps.",
    _within(_whole, 0, 2**31 - 1),
)
TWO_STEPS = Kind(
    "a whole number in [2, 2147483647]",
    "β begins to grow after them.",
    _within(_whole, 2, 2**31 - 1),
)
NS_STEPS = Kind(
    f"a whole number in [0, {MOST_NS_STEPS}]",
    "It counts iterations of Newton-Schulz, usually 5.",
    _within(_whole, 0, MOST_NS_STEPS),
)
EVERY = Kind(
    "a whole number in [1, 2147483647]",
    "It counts the steps from one recorded y and x to the next.",
    _within(_whole, 1, 2**31 - 1),
)
SEED = Kind(
    "a whole number in [0, 4294967295]",
    "It is the key of the random bits.",
    _within(_whole, 0, 2**32 - 1),
)
ESTIMATE = Kind(
    "a number in [1e-12, 1e6]",
    "Prodigy multiplies its estimates, and the first of them is best left at 1e-6.",
    _within(_number, 1e-12, 1e6),
)
COEFFICIENTS = Kind(
    "three numbers that keep the iteration bounded",
    "Leave them out for Muon's own.",
    _coefficients,
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
    "params": PARAMS,
    "base": BASE,
    "lr": STEP_SIZE,
    "adam_lr": _or_none(STEP_SIZE),
    "momentum": INTERPOLATION,
    "betas": BETAS,
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
    "steps": TWO_STEPS,
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
    "ns_coefficients": COEFFICIENTS,
    "ns_steps": NS_STEPS,
    "ns_dtype": DTYPE,
    "adjust_lr_fn": _one_of(None, "original", "match_rms_adamw"),
    "decay_at": _one_of(*DECAY_AT),
    "decay_at_z": BOOLEAN,
    "state_dtype": DTYPE,
    "moment_dtype": DTYPE,
    "rounding": _one_of(*ROUNDINGS),
    "seed": SEED,
    "every": EVERY,
    "foreach": _or_none(BOOLEAN),
    "fused": _or_none(BOOLEAN),
    "capturable": BOOLEAN,
    "store_x": BOOLEAN,
    "silent_sgd_phase": BOOLEAN,
    "upstream_compatible": BOOLEAN,
    "skip_nonfinite": BOOLEAN,
    "process_group": _or_none(PROCESS_GROUP),
}
OF_MUON = {**ARGUMENTS, "momentum": DECAY_RATE}
OF_MOMENTS = {**ARGUMENTS, "betas": DECAY_RATES}
OF_PRODIGY = {**ARGUMENTS, "lr": MAGNITUDE}
