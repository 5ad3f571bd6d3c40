"""Numbers at the ends of their ranges: weights, counts, slopes, dtypes, NaN checks."""

from decimal import Decimal, localcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import sf_jax
from sf_jax._averaging import Weights, one_minus_power, polynomial_mean
from sf_jax._double import Double, double
from sf_jax._radam import rectification, rho

LAST = 2**31 - 1  # where an int32 count stays

# Every optimizer of the family, as a function of the learning rate.
MAKERS = {
    "sgd": sf_jax.schedule_free_sgd,
    "adamw": partial(sf_jax.schedule_free_adamw, weight_decay=0.1, warmup_steps=4),
    "adamw_momentum": partial(sf_jax.schedule_free_adamw, inner_momentum=0.9),
    "paper": partial(sf_jax.schedule_free_adamw, variant="paper"),
    "algoperf": partial(sf_jax.schedule_free_adamw, variant="algoperf"),
    "radam": sf_jax.schedule_free_radam,
    "radam_loud": partial(sf_jax.schedule_free_radam, silent_sgd_phase=False),
    "wrapped": lambda lr: sf_jax.schedule_free(optax.sgd(lr), lr),
    "refined": lambda lr: sf_jax.schedule_free_adamw(
        lr, average=sf_jax.refined_average(2.0)
    ),
    "gpa": sf_jax.gpa_adamw,
    "plus": partial(sf_jax.schedule_free_plus, c_warmup=2, sf_beta1_anneal_steps=4),
    "muon": sf_jax.schedule_free_muon,
    "normuon": partial(sf_jax.schedule_free_muon, row_b2=0.9),
    # With its own first d, 1e-6, x has hardly moved when differences are taken of it.
    "prodigy": partial(sf_jax.schedule_free_prodigy, estim_lr0=0.1),
}


def schedule_for(name):
    """From 0; optax's Prodigy divides 0 by 0 until a gradient meets an lr above 0."""
    return lambda lr: lr if name == "prodigy" else lambda count: lr * count / 8


def params(dtype=jnp.float32):
    return {
        "w": jnp.asarray([[1.0, -2.0], [0.5, 1.5]], dtype),
        "b": jnp.asarray([0.25, -1.0], dtype),
    }


def x_after(lr, make, schedule, steps):
    """The sum of x after so many steps on ``Σ y² / 2``."""
    tx = optax.with_extra_args_support(make(schedule(lr)))
    y = params(jnp.result_type(lr))

    def step(carry, _):
        y, state = carry
        loss = sum(jnp.sum(leaf**2) / 2 for leaf in jax.tree.leaves(y))
        updates, state = tx.update(y, state, y, value=loss)
        return (optax.apply_updates(y, updates), state), None

    (y, state), _ = jax.lax.scan(step, (y, tx.init(y)), length=steps)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sf_jax.eval_params(state, y)))


# Averaging weights


LRS = {
    "small": lambda k: jnp.full(k.shape, 1e-30),
    "large": lambda k: jnp.full(k.shape, 1e30),
    "warmup": lambda k: 0.1 * jnp.minimum(1, (k + 1) / 50),
    "growing": lambda k: 10.0 ** jnp.linspace(-30, 30, k.size),
    "falling": lambda k: 1.0 / (1 + k),
}
POWERS = [(0, 2), (0.5, 0), (10, 2), (100, 2), (1, 20), (0, 20)]


@cache
def step_sizes():
    """A row for each of LRS."""
    counts = jnp.arange(300, dtype=jnp.int32)
    return jnp.stack([lr(counts).astype(jnp.float32) for lr in LRS.values()])


@cache
def exact_ckp1(r, power):
    """w / W at each step, with w as large or small as it likes."""
    rows = []
    with localcontext(prec=50):
        for lrs in step_sizes().tolist():
            total, lr_max, row = Decimal(0), Decimal(0), []
            for k, lr in enumerate(lrs):
                lr_max = max(lr_max, Decimal(lr))
                weight = Decimal(k + 1) ** Decimal(r) * lr_max ** Decimal(power)
                total += weight
                row.append(float(weight / total))
            rows.append(row)
    return np.array(rows, np.float32)


def ckp1_of_scan(r, power, lrs):
    def body(weights, step):
        count, lr = step
        ckp1, weights = polynomial_mean(r, power)(count, double(lr), weights)
        return weights, ckp1

    zero = jnp.zeros((), jnp.float32)
    steps = jnp.arange(lrs.size, dtype=jnp.int32), lrs
    return jax.lax.scan(body, Weights(Double(zero, zero), zero), steps)[1]


# One function for all powers, as under inject_hyperparams.
ckp1_of_arrays = jax.jit(jax.vmap(ckp1_of_scan, (None, None, 0)))


@pytest.mark.parametrize(("r", "power"), POWERS)
@pytest.mark.parametrize("traced", [False, True], ids=["number", "array"])
def test_ckp1_does_not_depend_on_the_size_of_weights(r, power, traced):
    if traced:
        ckp1 = ckp1_of_arrays(jnp.float32(r), jnp.float32(power), step_sizes())
    else:
        ckp1 = jax.jit(jax.vmap(partial(ckp1_of_scan, r, power)))(step_sizes())
    exact = exact_ckp1(r, power)
    errors = (np.abs(ckp1 - exact) / np.spacing(exact)).max(axis=1)
    for name, error in zip(LRS, errors, strict=True):
        # A step size 1.6 times the last one is where logarithms lose the most.
        assert error <= 2 * (max(1, power) if name == "growing" else 1), name


@pytest.mark.parametrize("r", [10**12, -10.0], ids=["huge", "falling"])
def test_other_powers_of_the_step_stay_finite(r):
    average = polynomial_mean(r, 2)
    ratio = jnp.float32(1e30 if r < 0 else 1)
    weights = Weights(Double(ratio, jnp.zeros_like(ratio)), jnp.float32(0.1))
    ckp1, weights = average(jnp.int32(10**4), double(0.1), weights)
    assert ckp1 == pytest.approx(0 if r < 0 else 1, abs=1e-6)
    assert np.isfinite(weights.ratio).all()


# Counts


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"muon"}))
def test_the_last_count_is_as_the_one_before(name):
    """Bias corrections have vanished long ago and the weights of z hardly differ."""
    tx = optax.with_extra_args_support(MAKERS[name](0.1))
    p = params()
    update = jax.jit(tx.update)
    state = tx.init(p)
    _, state = update(p, state, p, value=jnp.float32(1))
    after = []
    for count in (LAST - 1, LAST):
        late = state._replace(count=jnp.int32(count))
        _, late = update(p, late, p, value=jnp.float32(1))
        assert late.count == LAST
        after.append((late.z, late.x, late.b1, late.weight_ratio, late.lr_max))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *after)


def test_scalars_at_the_last_count():
    last = jnp.int32(LAST)
    assert one_minus_power(0.999, last) == 1
    # ρ∞ = 2 / (1 - b2) - 1, from which only 2 t b2^t = 0 is taken.
    assert rho(0.999, last) == pytest.approx(1999, rel=1e-6)
    assert rectification(0.999, last) == pytest.approx(1, rel=1e-6)
    # 1 - β = 0.1 sqrt(999 / 2^31)
    assert 1 - sf_jax.growing_b1()(last) == pytest.approx(6.82e-5, rel=1e-2)


# Slopes


# Muon's matrices cost much to compile and add nothing that has a slope of its own.
# Those that are left out share their roots and divisions with one that is here.
SLOPES = [
    "plus",
    "radam_loud",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("adamw_momentum", "gpa", "paper", "prodigy", "refined")
    ),
]


@pytest.mark.parametrize("name", SLOPES)
def test_the_slope_of_x_by_lr_is_that_of_differences(name):
    """In reverse, where a zero times an infinite slope anywhere becomes NaN."""
    schedule, h = schedule_for(name), 1e-6
    f = partial(x_after, make=MAKERS[name], schedule=schedule, steps=7)
    with jax.enable_x64(True):
        points = 0.05 + h * jnp.arange(-1, 2, dtype=jnp.float64)
        # At once: each function of its own would be compiled.
        x, slopes = jax.jit(jax.vmap(jax.value_and_grad(f)))(points)
        difference = (x[2] - x[0]) / (2 * h)
    assert float(slopes[1]) == pytest.approx(float(difference), rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "radam_loud", "normuon"])
def test_a_parameter_without_gradient_has_slope_0(name):
    """Of what sf_jax computes: the roots of optax's Adam and Prodigy have none."""

    def z_after(lr):
        tx = optax.with_extra_args_support(MAKERS[name](lr))
        y = jnp.array([[1.0, 0.0]])  # of which the second stays at its optimum

        def step(carry, _):
            y, state = carry
            updates, state = tx.update(y, state, y, value=jnp.float32(1))
            return (optax.apply_updates(y, updates), state), None

        # RAdam divides by a root from the sixth step on.
        return jax.lax.scan(step, (y, tx.init(y)), length=7)[0][1].z

    slope = jax.jit(jax.jacfwd(z_after))(0.05)
    assert slope[0, 0] != 0
    assert slope[0, 1] == 0


# Checks for NaN


@pytest.mark.parametrize("name", ["algoperf", "plus", "radam_loud"])
def test_nothing_is_nan_on_the_way(name):
    """``checkify`` also looks at what a ``where`` leaves out."""

    def run():
        tx = optax.with_extra_args_support(MAKERS[name](schedule_for(name)(0.1)))
        y = {**params(), "b": jnp.zeros(2)}  # of which b has no gradient
        state = tx.init(y)
        for _ in range(2):
            updates, state = tx.update(y, state, y, value=jnp.float32(1))
            y = optax.apply_updates(y, updates)
        return sf_jax.eval_params(state, y)

    error, _ = checkify.checkify(run, errors=checkify.float_checks)()
    error.throw()


def test_an_injected_warmup_of_0_is_quiet():
    tx = optax.inject_hyperparams(sf_jax.schedule_free_sgd)(0.1, warmup_steps=0)
    p = params()
    with jax.debug_nans(True):
        _, state = tx.update(p, tx.init(p), p)
    np.testing.assert_allclose(state.inner_state.z["b"], 0.9 * p["b"], rtol=1e-6)


# Dtypes


def first_step(name, dtype):
    tx = optax.with_extra_args_support(MAKERS[name](0.1))
    p = params(dtype)
    state = tx.init(p)
    updates, state = tx.update(p, state, p, value=jnp.asarray(1, jnp.float32))
    return updates, state, sf_jax.eval_params(state, optax.apply_updates(p, updates))


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"muon", "gpa", "wrapped"}))
def test_float8_parameters_have_a_float32_state(name):
    updates, state, served = first_step(name, jnp.float8_e4m3fn)
    _, wide, x = first_step(name, jnp.float32)
    for leaf in jax.tree.leaves((updates, served)):
        assert leaf.dtype == jnp.float8_e4m3fn
    for ours, exact in ((state.z, wide.z), (state.x, x)):
        # The parameters at the start are numbers of float8.
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), ours, exact)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"muon", "normuon"}))
def test_strict_promotion(name, dtype):
    """Muon is left out: the bias corrections of optax promote."""
    with jax.numpy_dtype_promotion("strict"):
        first_step(name, dtype)


def test_strict_promotion_from_y_to_x_and_back():
    for store_x in (False, True):
        tx = sf_jax.schedule_free_sgd(0.1, state_dtype=jnp.bfloat16, store_x=store_x)
        y = params()
        with jax.numpy_dtype_promotion("strict"):
            updates, state = tx.update(y, tx.init(y), y)
            y = optax.apply_updates(y, updates)
            back = sf_jax.train_params(state, sf_jax.eval_params(state, y))
            if store_x:
                sf_jax.check_params(state, y)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2), back, y)
