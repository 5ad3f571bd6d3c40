"""Every argument of every public function, given what it can and what it cannot mean.

Each value is refused by an error that names the argument and quotes the value, or it
works: three steps in float32 give, but for rounding, what the same arguments give in
float64 with x stored.
"""

import functools
import math
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sf_jax
from sf_jax._arguments import ARGUMENTS, CHECKED, checked

NAN, INF = float("nan"), float("inf")
NUMBERS = [
    *(NAN, INF, -INF, -1, -1e-9, -0.5, 0, 0.0, 1e-300, 1e-30, 1e-3, 0.25, 0.5),
    *(1 - 2**-53, 1, 1.0, 1.5, 2, 2.5, 3, 100.0, 1e12, 1e31, 1e300, 10**12),
    *(-1e12, 10**400, 10**5000, -(10**400), 2**31, 2**32, 2**64, Fraction(1, 2)),
    *(np.float32(0.5), np.float64(0.5), np.float64("nan"), np.float16(2), np.int64(3)),
]
ARRAYS = [
    *(jnp.array(0.5), jnp.array([0.5]), jnp.array(2), jnp.array(NAN), jnp.array(-0.5)),
    *(jnp.array(1j), jnp.array(True), jnp.ones(2), np.array(0.5), np.ones(3)),
]
OTHERS = [
    *(None, True, False, np.bool_(True), "", "no", "0.5", "y", "z", "x", "w", "nan"),
    *("nearest", "stochastic", "paper", "algoperf", "spectral", "dion", "float32"),
    *(jnp.float32, jnp.bfloat16, jnp.float16, np.int8, jnp.float8_e4m3fn, bool),
    *(b"y", 1j, Decimal("0.5"), set(), object(), (), (0.9,), (0.5, 0.5, 0.5)),
    *((3.0, -4.0, 2.0), (1e30, 1e30, 1e30), (NAN, 1.0, 1.0), [(2.0, -1.5, 0.5)] * 5),
    *({"w": True, "b": False}, {"w": 1, "b": 0}, {"w": "yes", "b": "no"}),
    *(optax.sgd(0.5), optax.contrib.MuonDimensionNumbers()),
    *(lambda *_: 0.5, lambda *_: -1.0, lambda *_: None, lambda *_: "no"),
    *(lambda *_: jnp.ones(3), lambda *_: True, lambda *_: 0.0),
    *(jnp.complex64, 1e-60, np.float32(1e-38)),
]
VALUES = [*NUMBERS, *ARRAYS, *OTHERS]

MADE = {
    "schedule_free": {"base_optimizer": optax.sgd(0.5), "learning_rate": 0.5},
    "refined_average": {"c": 4.0},
}


def build(name, options, **more):
    made = getattr(sf_jax, name)(**{**MADE.get(name, {}), **options})
    if name == "growing_b1":
        return sf_jax.schedule_free_sgd(0.5, b1=made, **more)
    if name.endswith("average"):
        return sf_jax.schedule_free_sgd(0.5, average=made, **more)
    return getattr(sf_jax, name)(**{**MADE.get(name, {}), **more, **options})


def run(name, options, dtype=jnp.float32, **more):
    """What the parameters, x and z are after three steps."""
    params = {
        "w": jnp.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype),
        "b": jnp.array([2.0, -1.0], dtype),
    }
    tx = build(name, options, **more)
    state = tx.init(params)
    for k in range(3):
        grads = jax.tree.map(lambda p, k=k: p / 2 + (0.25 if k else -0.125), params)
        loss = {"value": 2.0 + k} if name == "schedule_free_plus" else {}
        updates, state = tx.update(grads, state, params, **loss)
        params = optax.apply_updates(params, updates)
    trees = {"y": params, "x": sf_jax.eval_params(state, params), "z": state.z}
    return jax.tree.map(lambda leaf: np.asarray(leaf, float), trees)


# Refused where init or update knows more: whether x is stored, which axes are mapped,
# of what structure params are.
SEEN_LATER = {
    *(("growing_b1", "b1"), ("schedule_free_plus", "axis_name")),
    *(
        (name, option)
        for name in CHECKED
        for option in CHECKED[name]
        if "mask" in option
    ),
    ("schedule_free_muon", "muon_weight_dimension_numbers"),
}


def shown(value):
    try:
        return " ".join(repr(value).split())[:97]
    except ValueError:
        return f"an integer of {value.bit_length()} bits"


def refusal(call):
    """The message of the error, or None."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def names_it(message, option, value):
    quotes = shown(value) in message or str(value) in message
    return quotes and re.search(rf"\b{option}\b", message)


def assert_works(name, option, value):
    given = functools.partial(run, name, {option: value})
    stored = {} if option == "store_x" else {"store_x": True}
    with jax.enable_x64(True):
        right = given(jnp.float64, **stored)
    ours = given()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(right))
    assert math.isfinite(largest), f"{name}({option}={shown(value)})"
    if largest > 1e15:  # then a float32 may have no room for what is squared on the way
        return
    coarse = "dtype" in option or name.endswith(("muon", "prodigy"))
    for ours_leaf, leaf in zip(
        jax.tree.leaves(ours), jax.tree.leaves(right), strict=True
    ):
        np.testing.assert_allclose(
            ours_leaf,
            leaf,
            rtol=0,
            atol=max(1.0, largest) * (2**-5 if coarse else 2**-18),
            err_msg=f"{name}({option}={shown(value)})",
        )


def accepted(name, option, values):
    """The values that the function takes; the others are refused by name."""
    taken = []
    for value in values:
        options = {**MADE.get(name, {}), option: value}
        message = refusal(functools.partial(getattr(sf_jax, name), **options))
        if message is None:
            taken.append(value)
        else:
            assert names_it(message, option, value), (
                f"{option}={shown(value)}: {message}"
            )
    return taken


def assert_works_or_names(name, option, value):
    """What a function returns is seen when it is called, in the first step."""
    if not callable(value) and (name, option) not in SEEN_LATER:
        assert_works(name, option, value)
        return
    if isinstance(value, type):  # which is called with what it cannot take
        return
    message = refusal(functools.partial(assert_works, name, option, value))
    if message is not None:
        assert re.search(rf"\b{option}\b", message), f"{name}: {message}"


def test_an_argument_is_refused_by_name_or_works():
    rng = random.Random(0)
    taken = [
        (name, option, value)
        for name in CHECKED
        for option in CHECKED[name]
        for value in accepted(name, option, rng.sample(VALUES, 25))
    ]
    of_one = [case for case in taken if case[0] == "schedule_free_sgd"]
    for case in rng.sample(of_one, 8):
        assert_works_or_names(*case)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_every_value_of_an_argument_is_refused_by_name_or_works(name):
    for option in CHECKED[name]:
        taken = accepted(name, option, VALUES)
        assert 0 < len(taken) < len(VALUES), f"{option}: {taken}"
        if name == "schedule_free_muon":  # of which each is compiled anew
            taken = random.Random(option).sample(taken, min(3, len(taken)))
        for value in taken:
            assert_works_or_names(name, option, value)


def test_an_argument_that_has_no_kind_cannot_be_added():
    with pytest.raises(KeyError, match="unheard_of"):
        checked()(lambda unheard_of: None)


ONCE_ACCEPTED = [  # and then wrong, NaN, or an integer of 14 GB
    *[
        (name, value, sf_jax.schedule_free_adamw)
        for name, values in {
            "r": (NAN, "1", 10**16),
            "weight_lr_power": (NAN, "2"),
            "weight_decay": (INF,),
            "eps": (INF,),
            "b1": (False, NAN),
            "mask": ("no", 1, {"w": 1, "b": 0}),
            "store_x": ("no",),
        }.items()
        for value in values
    ],
    *[("estim_lr0", v, sf_jax.schedule_free_prodigy) for v in (0, -1, NAN)],
    ("b1", NAN, sf_jax.growing_b1),
    ("steps", NAN, sf_jax.growing_b1),
    ("c", False, sf_jax.refined_average),
]


@pytest.mark.parametrize(("option", "value", "make"), ONCE_ACCEPTED)
def test_what_was_once_accepted_is_refused(option, value, make):
    with pytest.raises((TypeError, ValueError), match=f"^{option} must be .*got "):
        make(**{option: value})


@pytest.mark.parametrize(
    "b1",
    [
        sf_jax.growing_b1(0.0),
        optax.linear_schedule(0.9, 0.0, 10_000),
        optax.cosine_decay_schedule(1.0, 3000, alpha=0.001),
        lambda count: 0.9 - 0.9 * (count == 777),
    ],
)
def test_a_schedule_of_b1_that_comes_near_0_needs_x(b1):
    with pytest.raises(ValueError, match=r"β .*store_x=True"):
        sf_jax.schedule_free_sgd(0.1, b1=b1).init(jnp.ones(2))
    sf_jax.schedule_free_sgd(0.1, b1=b1, store_x=True).init(jnp.ones(2))


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in CHECKED for o, kind in CHECKED[n].items() if kind.read_returned],
)
@pytest.mark.parametrize(
    "returned", [None, "no", True, 1j, jnp.ones(3), NAN, jnp.array(-INF), 1e31], ids=str
)
def test_a_schedule_is_refused_by_what_it_begins_with(name, option, returned):
    tx = build(name, {option: lambda count: returned})
    with pytest.raises(
        (TypeError, ValueError), match=f"^{option} .*{re.escape(shown(returned))}"
    ):
        jax.eval_shape(tx.init, {"w": jnp.ones((2, 3)), "b": jnp.ones(2)})


FUNCTIONS = [
    ("schedule_free_sgd", "average"),
    ("schedule_free", "lr_scale"),
    ("schedule_free_sgd", "mask"),
    ("schedule_free_muon", "weight_decay_mask"),
    ("schedule_free_muon", "muon_weight_dimension_numbers"),
]


@pytest.mark.parametrize(("name", "option"), FUNCTIONS)
@pytest.mark.parametrize("returned", [(), "no", 1j, jnp.ones(3), {"w": 1}], ids=str)
def test_a_function_is_refused_by_what_it_returns(name, option, returned):
    decay = {} if name == "schedule_free" else {"weight_decay": 0.1}
    with pytest.raises((TypeError, ValueError), match=f"^{option} must "):
        run(name, {option: lambda *_: returned, **decay})


@pytest.mark.parametrize(("name", "option"), FUNCTIONS[2:])
def test_a_tree_of_another_structure_is_refused(name, option):
    with pytest.raises(ValueError, match=f"^{option} must have the structure"):
        run(name, {option: (), "weight_decay": 0.1})


@pytest.mark.parametrize("name", ["adamw", "plus", "muon", "prodigy", "radam", "sgd"])
def test_traced_numbers_are_taken(name):
    """As ``optax.inject_hyperparams`` gives them under jit."""
    name = f"schedule_free_{name}"
    tx = optax.inject_hyperparams(getattr(sf_jax, name))()
    params, loss = {"w": jnp.ones((2, 3))}, {}
    if name == "schedule_free_plus":
        loss = {"value": jnp.array(1.0)}

    def steps(params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params, **loss)
        return updates, state.hyperparams

    updates, numbers = jax.eval_shape(steps, params)
    assert updates["w"].shape == (2, 3)
    assert {"learning_rate", "b1"} <= numbers.keys()


@pytest.mark.parametrize("power", ["r", "weight_lr_power"])
def test_a_huge_power_makes_no_huge_integer(power):
    """With r each step outweighs all before it; equal steps have equal weights."""
    held = run("schedule_free_sgd", {"learning_rate": 0.1, power: 10**12})
    fewer = run("schedule_free_sgd", {"learning_rate": 0.1, power: 0})
    expected = held["z"] if power == "r" else fewer["x"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), held["x"], expected
    )


def test_the_page_has_every_argument_and_its_range():
    own = [
        (f"`{option}` of `{name}`", kind)
        for name, kinds in CHECKED.items()
        for option, kind in kinds.items()
        if kind is not ARGUMENTS[option]
    ]
    named = [(f"`{option}`", kind) for option, kind in ARGUMENTS.items()]
    rows = [f"| {name} | {kind.accepts} |" for name, kind in named + own]
    page = Path(sf_jax.__file__).parents[1] / "docs" / "reference" / "arguments.md"
    section = page.read_text().partition("## JAX\n")[2].partition("## ")[0]
    table = "\n".join(rows)
    assert table in section, f"write this into {page}:\n{table}"


def test_the_page_says_how_many_cases_there_are():
    of_one = list(map(len, CHECKED.values()))
    returning = sum(bool(k.read_returned) for o in CHECKED.values() for k in o.values())
    page = Path(sf_jax.__file__).parents[1] / "docs" / "reliability.md"
    expected = (
        f"{sum(of_one) * len(VALUES):,} in JAX ({len(of_one)} functions, "
        f"{sum(of_one)} arguments, {len(VALUES)} values)"
    )
    assert expected in " ".join(page.read_text().split())
    assert f"{returning} that may be schedules" in " ".join(page.read_text().split())
