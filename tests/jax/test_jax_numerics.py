"""Numbers at the ends of their ranges: weights, counts, slopes, dtypes, NaN checks."""

from decimal import Decimal, localcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sf_jax
from sf_jax._averaging import Weights, one_minus_power, polynomial_average
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
        lr, average=sf_jax.refined_average(2.0, b1=0.9)
    ),
    "gpa": sf_jax.gpa_adamw,
    "plus": partial(sf_jax.schedule_free_plus, c_warmup=2, sf_beta1_anneal_steps=4),
    "muon": sf_jax.schedule_free_muon,
    "normuon": partial(sf_jax.schedule_free_muon, row_b2=0.9),
    "prodigy": sf_jax.schedule_free_prodigy,
}


def from_0(lr):
    return lambda count: lr * count / 8


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


def exact_ckp1(lrs, r, power):
    """w / W at each step, with w as large or small as it likes."""
    with localcontext(prec=50):
        total, lr_max = Decimal(0), Decimal(0)
        for k, lr in enumerate(lrs):
            lr_max = max(lr_max, Decimal(float(lr)))
            weight = Decimal(k + 1) ** Decimal(r) * lr_max ** Decimal(power)
            total += weight
            yield float(weight / total)


LRS = {
    "small": lambda k: jnp.full(k.shape, 1e-30),
    "large": lambda k: jnp.full(k.shape, 1e30),
    "warmup": lambda k: 0.1 * jnp.minimum(1, (k + 1) / 50),
    "growing": lambda k: 10.0 ** jnp.linspace(-30, 30, k.size),
    "falling": lambda k: 1.0 / (1 + k),
}


@pytest.mark.parametrize("lrs", LRS)
@pytest.mark.parametrize("traced", [False, True], ids=["number", "array"])
def test_ckp1_does_not_depend_on_the_size_of_weights(lrs, traced):
    counts = jnp.arange(300, dtype=jnp.int32)
    step_sizes = LRS[lrs](counts).astype(jnp.float32)
    zero = jnp.zeros((), jnp.float32)
    for r, power in ((0, 2), (0.5, 0), (10, 2), (100, 2), (1, 20), (0, 20)):

        def body(weights, step, r, power):
            count, lr = step
            ckp1, weights = polynomial_average(r, power)(count, double(lr), weights)
            return weights, ckp1

        def run(r, power):
            body_of = partial(body, r=r, power=power)
            start = Weights(Double(zero, zero), zero)
            return jax.lax.scan(body_of, start, (counts, step_sizes))[1]

        run = jax.jit(run, static_argnums=() if traced else (0, 1))
        exact = np.array([*exact_ckp1(step_sizes, r, power)], np.float32)
        # A step size 1.6 times the last one is where logarithms lose the most.
        steep = power if lrs == "growing" else 1
        error = np.abs(run(r, power) - exact) / np.spacing(exact)
        assert error.max() <= 2 * max(1, steep), (r, power)


@pytest.mark.parametrize("r", [10**12, -10.0], ids=["huge", "falling"])
def test_other_powers_of_the_step_stay_finite(r):
    average = polynomial_average(r, 2)
    ratio = jnp.float32(1e30 if r < 0 else 1)
    weights = Weights(Double(ratio, jnp.zeros_like(ratio)), jnp.float32(0.1))
    ckp1, weights = average(jnp.int32(10**4), double(0.1), weights)
    assert ckp1 == pytest.approx(0 if r < 0 else 1, abs=1e-6)
    assert np.isfinite(weights.ratio).all()


# Counts


@pytest.mark.parametrize("name", MAKERS)
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


def slope_and_difference(f, h=1e-6):
    f, lr = jax.jit(f), jnp.float64(0.05)
    return jax.jit(jax.jacfwd(f))(lr), (f(lr + h) - f(lr - h)) / (2 * h)


@pytest.mark.parametrize("name", MAKERS)
def test_the_slope_of_x_by_lr_is_that_of_differences(name):
    with jax.enable_x64(True):
        slope, difference = slope_and_difference(
            partial(x_after, make=MAKERS[name], schedule=from_0, steps=7)
        )
    assert slope == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("name", ["radam", "radam_loud", "adamw"])
def test_the_slope_in_reverse_with_a_constant_lr(name):
    f = partial(x_after, make=MAKERS[name], schedule=lambda lr: lr, steps=7)
    with jax.enable_x64(True):
        _, difference = slope_and_difference(f)
        slope = jax.jit(jax.grad(f))(jnp.float64(0.05))
    assert slope == pytest.approx(difference, rel=1e-6)


# Checks for NaN


@pytest.mark.parametrize("name", ["sgd", "adamw", "radam", "plus"])
def test_debug_nans_is_quiet_at_the_first_step(name):
    tx = optax.with_extra_args_support(MAKERS[name](from_0(0.1)))
    p = params()
    with jax.debug_nans(True):
        tx.update(p, tx.init(p), p, value=jnp.float32(1))


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


@pytest.mark.parametrize("name", MAKERS)
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
