"""Thousands of leaves: as much is traced and compiled for each of them."""

import gc
import re
import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_steps import FAMILY, OPTIMIZERS, OVER_OPTAX, compile_step

import sf_jax

MAKE = {name: optimizer.make for name, optimizer in (OPTIMIZERS | FAMILY).items()}
MAKE |= {name: ours for name, (ours, _) in OVER_OPTAX.items()}
LEAF = jax.ShapeDtypeStruct((4, 6), jnp.float32)
OURS = sf_jax.schedule_free_adamw(0.01, 10, weight_decay=0.1)
THEIRS = optax.contrib.schedule_free_adamw(0.01, 10, weight_decay=0.1)


def equations(jaxpr):
    """Of all depths."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


def traced(tx, leaves):
    """How many equations init and update have, and how many of update are scalars."""
    params = [LEAF] * leaves
    update = optax.with_extra_args_support(tx).update
    init, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
    step = jax.make_jaxpr(lambda g, s, p: update(g, s, p, value=1.0))(
        params, state, params
    )
    found = list(equations(step.jaxpr))
    scalars = [e for e in found if all(v.aval.shape == () for v in e.outvars)]
    return len(list(equations(init.jaxpr))), len(found), len(scalars)


@pytest.mark.parametrize("name", MAKE)
def test_equations_grow_by_as_many_for_each_leaf(name):
    two, four, eight = (traced(MAKE[name](), leaves) for leaves in (2, 4, 8))
    for a, b, c in zip(two, four, eight, strict=True):
        assert c - b == 2 * (b - a)
    if name not in OVER_OPTAX:
        # Coefficients are computed once. ScheduleFree+ has for each leaf two sums, a
        # division by β and two additions to the totals.
        assert eight[2] - four[2] == (5 * 4 if name == "plus" else 0)


def test_a_leaf_has_as_few_equations_as_in_optax():
    (init, step, _), (their_init, their_step, _) = (
        [b - a for a, b in zip(traced(tx, 2), traced(tx, 3), strict=True)]
        for tx in (OURS, THEIRS)
    )
    assert step <= their_step
    # The zeros of v are computed of z, so that they lie where z lies: in two equations.
    assert init <= their_init + 1


def instructions(make, leaves):
    """Of the compiled step, by the shape and kind of their results."""
    text = compile_step(make(), [LEAF] * leaves).as_text()
    return Counter(re.findall(r" = (\S+?)(?:\{\S*\})? ([\w-]+)\(", text))


def scalars_for_each_leaf(make):
    """How many instructions that compute scalars a leaf adds."""
    grown = instructions(make, 4)
    grown.subtract(instructions(make, 2))
    moved = ("parameter", "constant", "bitcast")
    scalars = sum(
        number
        for (shape, kind), number in grown.items()
        if shape == "f32[]" and kind not in moved
    )
    return scalars / 2


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="about fusions on CPUs")
@pytest.mark.parametrize("name", ["adamw", "adamw_paper", "adamw_algoperf", "muon"])
def test_no_leaf_computes_the_numbers_of_the_step(name):
    """XLA fuses cheap scalars into every loop that wants them."""
    scalars = scalars_for_each_leaf(partial(MAKE[name], warmup_steps=10))
    base = OVER_OPTAX[name][1] if name in OVER_OPTAX else None
    assert scalars <= 2 + (scalars_for_each_leaf(lambda: base) if base else 0)


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="about fusions on CPUs")
def test_instructions_and_loops_grow_by_as_many_for_each_leaf():
    def counted(tx, leaves):
        found = instructions(lambda: tx, leaves)
        loops = [n for (_, kind), n in found.items() if kind in ("fusion", "copy")]
        return np.array([sum(found.values()), sum(loops)])

    ten, twenty, forty = (counted(OURS, leaves) for leaves in (10, 20, 40))
    np.testing.assert_array_equal(forty - twenty, 2 * (twenty - ten))
    # A call is as long as its loops: z', v', y', and the copy of z that y' wants.
    assert (twenty - ten <= counted(THEIRS, 20) - counted(THEIRS, 10)).all()


def test_x_of_a_leaf_is_one_call():
    """Outside of jit each operation is a call, and calls are what many leaves cost."""
    tx = sf_jax.schedule_free_sgd(0.1)
    params = [jnp.ones((4, 6))] * 3
    state = tx.init(params)
    x = jax.make_jaxpr(lambda s, p: sf_jax.eval_params(s, p))(state, params)
    fewer = jax.make_jaxpr(lambda s, p: sf_jax.eval_params(s, p))(
        tx.init(params[:2]), params[:2]
    )
    # y - z, times (1 - β) / β, plus y
    assert len(x.jaxpr.eqns) - len(fewer.jaxpr.eqns) == 3


def python_calls(fn, *args):
    """How many functions Python calls, of Python and of C, in a second run."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    fn(*args)  # traces and compiles what is kept
    gc.disable()
    sys.setprofile(count)
    try:
        fn(*args)
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def named(leaves, name=str):
    return {name(f"layer_{i}"): {"kernel": jnp.ones((4, 6))} for i in range(leaves)}


WORK = {
    "init traced": lambda tx, s, p: jax.eval_shape(lambda p: tx.init(p), p),
    "init": lambda tx, s, p: tx.init(p),
    "update traced": lambda tx, s, p: jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p), p, s, p
    ),
    "x": lambda tx, s, p: sf_jax.eval_params(s, p),
}


@pytest.mark.parametrize("work", WORK)
def test_python_does_as_much_for_each_leaf(work):
    def calls(tx, leaves):
        params = named(leaves)
        return python_calls(WORK[work], tx, tx.init(params), params)

    ten, twenty, forty = (calls(OURS, leaves) for leaves in (10, 20, 40))
    # Dicts and lists that become longer add a call now and then.
    assert forty - twenty <= 2 * (twenty - ten) + 5
    # A leaf of their x is four calls into compiled code, which are short for Python and
    # long for the processor: calls of Python's are no measure of it.
    if work != "x":
        assert twenty - ten <= calls(THEIRS, 20) - calls(THEIRS, 10)


def test_no_leaf_is_looked_for_among_all_others():
    """What compares tuples in a list is one call, and as long as the list."""
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    def comparisons(leaves):
        nonlocal compared
        params = named(leaves, Name)
        state = OURS.init(params)
        jax.eval_shape(OURS.update, params, state, params)
        sf_jax.train_params(state, sf_jax.eval_params(state, named(leaves, Name)))
        done, compared = compared, 0
        return done

    ten, twenty, forty = map(comparisons, (10, 20, 40))
    assert forty - twenty <= 2 * (twenty - ten)
