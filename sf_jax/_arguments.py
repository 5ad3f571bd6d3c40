"""The arguments of the public functions: one table of what each may be, and its check.

The errors, the table of the documentation and the fuzz of the tests are drawn from
:data:`ARGUMENTS`. Each error names the argument, quotes the value and says what would
be right.

Under ``optax.inject_hyperparams`` every number arrives as an array, often a traced one,
whose shape and dtype are checked and whose value cannot be read.
"""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

SEQUENCES = ("y", "z", "x")
VARIANTS = ("standard", "paper", "algoperf", "algoperf_v2")
ROUNDINGS = ("nearest", "stochastic")
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")

P = ParamSpec("P")
T = TypeVar("T")


class Kind(NamedTuple):
    """What an argument may be."""

    accepts: str  # in words, after "must be"
    advice: str  # what it is, or what to give instead
    # The value as the function gets it: a Python number for NumPy's. Raises what is no
    # value of this kind: TypeError by its type, ValueError by its size.
    read: Callable[[Any], Any]
    # The same of what a schedule returns; None where the argument can be no schedule.
    read_returned: Callable[[Any], Any] | None = None


def checked(**own: Kind) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: the function gets its arguments as :func:`check` returns them.

    Args:
      own: kinds of arguments that mean something else here than in :data:`ARGUMENTS`.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        kinds = {
            name: own.get(name) or ARGUMENTS[name] for name in signature.parameters
        }
        CHECKED[function.__name__] = kinds

        @functools.wraps(function)
        def with_checked(*args: P.args, **kwargs: P.kwargs) -> T:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                given.arguments[name] = check(name, value, kinds[name])
            made: Any = function(*given.args, **given.kwargs)
            schedules = {
                name: value
                for name, value in given.arguments.items()
                if kinds[name].read_returned and _is_schedule(value)
            }
            if not schedules or not hasattr(made, "init"):
                return made

            def init(params: optax.Params) -> Any:
                for name, schedule in schedules.items():
                    begins_within(name, schedule, kinds[name])
                return made.init(params)

            return made._replace(init=init)

        return with_checked

    return decorate


CHECKED: dict[str, dict[str, Kind]] = {}
"""The kinds of the arguments of each function that :func:`checked` has decorated."""


def check(name: str, value: Any, kind: Kind | None = None) -> Any:
    """The value as it is to be used.

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


def at(name: str, value: Any, count: jax.Array) -> Any:
    """A number, an array, or what a schedule gives at a count, a scalar as well."""
    return scalar(name, value(count)) if callable(value) else value


def scalar(name: str, result: Any) -> Any:
    """What a function returned, refused by the argument's name if it is no scalar."""
    if not _is_real(result):
        raise TypeError(
            f"{name} must return a real scalar, got one that returns {_shown(result)}."
        )
    return result


def fitted(
    name: str,
    tree_or_function: Any,
    params: optax.Params,
    kind: Kind,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """A tree, or what a function of params returns, with a leaf for each of params."""
    tree = tree_or_function
    if is_function(tree):
        tree = check(name, tree(params), kind)
    try:
        return jax.tree.broadcast(tree, params, is_leaf)
    except ValueError:
        raise ValueError(
            f"{name} must have the structure of params, or of the beginning of one, "
            f"{_shown(jax.tree.structure(params))}, got {_shown(tree)}. {kind.advice}"
        ) from None


def begins_within(
    name: str, schedule: Callable[[Any], Any], kind: Kind | None = None
) -> None:
    """Refuses a schedule by what it returns at count 0, where that can be read."""
    kind = kind or ARGUMENTS[name]
    with jax.ensure_compile_time_eval():
        first = scalar(name, schedule(jnp.zeros((), jnp.int32)))
    assert kind.read_returned
    returned = kind._replace(read=kind.read_returned)
    check(f"{name} at count 0 of its schedule", first, returned)


def b1_within(schedule: Callable[[Any], Any], low: float, high: float) -> None:
    """Refuses a schedule of β that leaves an interval, from count 0 on.

    It is looked at where it can be read: at every count up to 4096, and from there in
    small steps, until it leaves [0, 1], which is taken for the end of the run. One that
    can only be called count by count is looked at at count 0, and one that is traced is
    not.
    """
    counts = np.unique(np.append(np.arange(4097), np.geomspace(4096, 2**31 - 1, 1000)))
    counts = counts.astype(np.int32)
    with jax.ensure_compile_time_eval():
        try:
            values = jax.vmap(schedule)(jnp.asarray(counts))
        except (TypeError, ValueError, jax.errors.JAXTypeError):
            counts = np.zeros(1, np.int32)
            values = schedule(jnp.zeros((), jnp.int32))
    if isinstance(values, jax.core.Tracer):
        return
    values = np.reshape(np.asarray(jax.device_get(values), float), -1)
    wrong = ~((values >= low) & (values <= high))
    ends = ~((values >= 0) & (values <= 1))
    if wrong[0] or (wrong & ~np.logical_or.accumulate(ends)).any():
        place = int(np.argmax(wrong))
        raise ValueError(
            f"β (b1, or mu_y) must stay in [{low:g}, {high:g}], got {values[place]:g} "
            f"at count {counts[place]} of its schedule. Clip it there, or, where it "
            "comes near 0 and y does not determine x, pass store_x=True."
        )


def is_number(value: Any) -> bool:
    """Whether value is a plain number, not an array, a schedule or None."""
    return isinstance(value, (numbers.Real, np.number))


def is_off(value: Any) -> bool:
    """Whether value is None or the number 0, and so can never become anything else.

    An array that holds 0 does not count: what a state holds must not depend on values
    that are unknown under ``jit``.
    """
    return value is None or (is_number(value) and value == 0)


# What reads a value


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray)) or hasattr(value, "__jax_array__")


def _is_schedule(value: Any) -> bool:
    return callable(value) and not _is_array(value)


def _is_real(value: Any) -> bool:
    """Whether value is a number or an array of one, real and no bool."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if not _is_array(value):
        return isinstance(value, numbers.Real)
    real = (jnp.floating, jnp.integer)
    return jnp.shape(value) == () and any(
        jnp.issubdtype(jnp.result_type(value), kind) for kind in real
    )


def _known(value: Any) -> float | None:
    """The value of an array as a float; None where it cannot be read."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        value = value.__jax_array__()
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return float(jax.device_get(value))


def _numbers(
    low: float,
    high: float,
    advice: str,
    *,
    below: float | None = None,
    above_zero: float | None = None,
    schedule: bool = False,
) -> Kind:
    """Numbers from low to high and below another number, also in arrays.

    What a float32 has no room for is no number ``above_zero``; an array may come near
    to 0 as training goes on.
    """

    def read_number(value: Any) -> Any:
        if _is_array(value) and jnp.shape(value) != ():
            raise ValueError
        if not _is_real(value):
            raise TypeError
        number = _known(value) if _is_array(value) else float(value)
        if number is not None and (
            not low <= number <= high or (below is not None and number >= below)
        ):
            raise ValueError
        if above_zero and not _is_array(value) and 0 < float(value) < above_zero:
            raise ValueError
        return value if _is_array(value) else number

    def read(value: Any) -> Any:
        return value if _is_schedule(value) else read_number(value)

    interval = f"[{above_zero or low:g}, {high:g}{']' if below is None else ')'}"
    words = f"a number in {interval}".replace("e+0", "e").replace("e+", "e")
    words = f"0 or {words}" if above_zero else words
    if not schedule:
        return Kind(f"{words} (or an array of one)", advice, read_number)
    words = f"{words} (or an array or a schedule of one)"
    return Kind(words, advice, read, read_number)


def _whole_numbers(low: int, high: int, advice: str, *, static: bool = False) -> Kind:
    """Whole numbers from low to high; ``static`` ones are Python's where known."""

    def read(value: Any) -> Any:
        if _is_array(value) and jnp.shape(value) != ():
            raise ValueError
        if not _is_real(value):
            raise TypeError
        number: Any = _known(value) if _is_array(value) else value
        if number is not None:
            # Trainers that read their arguments from a command line pass 100.0.
            if number % 1 != 0:
                raise TypeError
            if not low <= int(number) <= high:
                raise ValueError
        if _is_array(value) and (number is None or not static):
            return value
        return int(number)

    words = f"a whole number in [{low}, {high}] (or an array of one)"
    return Kind(words, advice, read)


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


def _dtype(value: Any) -> Any:
    if _is_array(value) or isinstance(value, np.generic):
        raise TypeError
    dtype = jnp.dtype(value)
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 16:
        raise ValueError
    return dtype


def _function(value: Any) -> Any:
    if not callable(value):
        raise TypeError
    return value


def _is_bool(leaf: Any) -> bool:
    return isinstance(leaf, (bool, np.bool_)) or (
        _is_array(leaf)
        and jnp.shape(leaf) == ()
        and jnp.issubdtype(jnp.result_type(leaf), jnp.bool_)
    )


def is_function(tree_or_function: Any) -> bool:
    """Whether the argument is a function that returns a tree, and not itself a tree.

    An Equinox module is a tree that is callable as a whole. Its leaves are arrays or
    bools, which are not callable, while a function is its own only leaf.
    """
    return callable(tree_or_function) and all(
        map(callable, jax.tree.leaves(tree_or_function))
    )


def _bools(value: Any) -> Any:
    if not all(map(_is_bool, jax.tree.leaves(value))):
        raise TypeError
    return value


def _mask(value: Any) -> Any:
    return value if is_function(value) else _bools(value)


def is_dimension_numbers(node: Any) -> bool:
    """Whether a node says how optax's Muon sees a leaf; None is no matrix."""
    return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def _dimension_numbers(value: Any) -> Any:
    leaves = jax.tree.leaves(value, is_leaf=is_dimension_numbers)
    if not callable(value) and not all(map(is_dimension_numbers, leaves)):
        raise TypeError
    return value


def _coefficients(value: Any) -> Any:
    if isinstance(value, str):
        if value not in _PRESETS:
            raise ValueError
        return value
    if isinstance(value, jax.core.Tracer):
        return value
    rows = np.asarray(jax.device_get(value))
    if rows.dtype.kind not in "fiu":
        raise TypeError
    if rows.ndim not in (1, 2) or rows.shape[-1] != 3 or rows.size == 0:
        raise ValueError
    # What becomes of the singular values of a matrix whose norm is 1.
    s = np.linspace(0, 1, 33)
    steps = rows if rows.ndim == 2 else [rows] * MOST_NS_STEPS
    for a, b, c in np.asarray(steps, float):
        s = a * s + b * s**3 + c * s**5
        if not (np.abs(s) < 100).all():
            raise ValueError
    return value


def _axis_name(value: Any) -> Any:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (tuple, list, set, frozenset)) or not all(
        isinstance(name, str) for name in names
    ):
        raise TypeError
    return value


def _transformation(value: Any) -> Any:
    if not callable(getattr(value, "init", None)) or not callable(
        getattr(value, "update", None)
    ):
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
MOST_NS_STEPS = 99
_PRESETS = ("standard", "dion")
_WEIGHT = "It is the weight of one average in another (β, usually 0.9 to 0.98)."
_STEP_SIZE = "It is the step size; updates already point downhill: give its magnitude."

INTERPOLATION = _numbers(0, 1, _WEIGHT)
SCHEDULED_INTERPOLATION = _numbers(0, 1, _WEIGHT, schedule=True)
DECAY_RATE = _numbers(
    0, 1, "It is the decay rate of a moving average (usually 0.9 to 0.999).", below=1
)
STEP_SIZE = _numbers(0, LARGEST, _STEP_SIZE, above_zero=1 / LARGEST, schedule=True)
MAGNITUDE = _numbers(0, LARGEST, "Give its magnitude.")
POWER = _numbers(
    -1e15, 1e15, "It is the power with which steps are weighed, usually 0 to 2."
)
POWER_OR_NONE = _or_none(POWER)
FLOOR = _numbers(
    -LARGEST, LARGEST, "It is the least loss thought possible.", schedule=True
)
STEPS = _whole_numbers(
    0,
    2**31 - 1,
    "It counts steps, 0 for none; for a share of the run, give that share times the "
    "number of its steps.",
)
TWO_STEPS = _whole_numbers(2, 2**31 - 1, "β begins to grow after them.")
NS_STEPS = _whole_numbers(
    1,
    MOST_NS_STEPS,
    "It counts iterations of Newton-Schulz, usually 5.",
    static=True,
)
SEED = _whole_numbers(0, 2**32 - 1, "It is the key of the random bits.")
ESTIMATE = _numbers(
    1e-12,
    1e6,
    "Prodigy multiplies its estimates, and the first of them is best left at 1e-6.",
)
DECAY_AT = _one_of(*SEQUENCES)
DECAY_AT_OR_NONE = _or_none(DECAY_AT)
PRODIGY_VARIANT = _one_of("standard", "algoperf")
BOOLEAN = Kind("True or False", "It is a switch.", _boolean)
DTYPE = Kind(
    "a floating dtype of 16 bits or more",
    "Leave it out for float32 or wider.",
    _dtype,
)
MASK = Kind(
    "a tree of bools or a function of params that returns one",
    "It says which leaves decay.",
    _mask,
)
DIMENSIONS = Kind(
    "a tree of optax.contrib.MuonDimensionNumbers or a function that returns one",
    "It says which leaves are matrices.",
    _dimension_numbers,
)
BOOLS = Kind("a function that returns a tree of bools", MASK.advice, _bools)
FUNCTION = Kind("a function", "The docstring says of what.", _function)

ARGUMENTS: dict[str, Kind] = {
    "learning_rate": STEP_SIZE,
    "adam_learning_rate": _or_none(STEP_SIZE),
    "warmup_steps": _or_none(STEPS),
    "b1": SCHEDULED_INTERPOLATION,
    "b2": DECAY_RATE,
    "inner_momentum": _or_none(DECAY_RATE),
    "momentum": DECAY_RATE,
    "row_b2": _or_none(DECAY_RATE),
    "eps": MAGNITUDE,
    "weight_decay": _or_none(MAGNITUDE),
    "r": POWER,
    "weight_lr_power": POWER,
    "c": MAGNITUDE,
    "mu_y": SCHEDULED_INTERPOLATION,
    "mu_x": SCHEDULED_INTERPOLATION,
    "sf_beta1": INTERPOLATION,
    "sf_beta1_anneal_steps": STEPS,
    "sf_beta1_max": DECAY_RATE,
    "polyak_beta": DECAY_RATE,
    "c_warmup": STEPS,
    "loss_floor": FLOOR,
    "beta3": _or_none(DECAY_RATE),
    "safeguard_warmup": BOOLEAN,
    "steps": TWO_STEPS,
    "rho": MAGNITUDE,
    "estim_lr0": ESTIMATE,
    "estim_lr_coef": ESTIMATE,
    "nesterov": BOOLEAN,
    "consistent_rms": _or_none(MAGNITUDE),
    "ns_coeffs": _or_none(
        Kind(
            "three numbers, or rows of three, that keep the iteration bounded",
            "Leave it out for optax's own.",
            _coefficients,
        )
    ),
    "ns_steps": _or_none(NS_STEPS),
    "adaptive": BOOLEAN,
    "preconditioning": _one_of(None, *PRECONDITIONINGS),
    "muon_weight_dimension_numbers": _or_none(DIMENSIONS),
    "weight_decay_mask": _or_none(MASK),
    "mask": _or_none(MASK),
    "decay_at": DECAY_AT,
    "variant": _one_of(*VARIANTS),
    "state_dtype": _or_none(DTYPE),
    "moment_dtype": _or_none(DTYPE),
    "rounding": _one_of(*ROUNDINGS),
    "seed": SEED,
    "average": _or_none(FUNCTION),
    "lr_scale": _or_none(FUNCTION),
    "base_optimizer": Kind(
        "an optax transformation, with init and update",
        "Give optax.sgd(0.1), for example.",
        _transformation,
    ),
    "axis_name": _or_none(
        Kind(
            "the name of a mesh axis or a tuple of names",
            "It says which axes of shard_map to sum over.",
            _axis_name,
        )
    ),
    "store_x": BOOLEAN,
    "silent_sgd_phase": BOOLEAN,
    "upstream_compatible": BOOLEAN,
    "per_device": BOOLEAN,
}
