"""The scalars of a step against exact arithmetic, at any count."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax._averaging import Weights, one_minus_power, polynomial_mean, scheduled
from sf_jax._double import Double, add, divide, double, multiply
from sf_jax._radam import rectification, rho

COUNTS = (10, 10**4, 2**24, 10**8)


def ulps(actual, exact):
    exact = float(exact)
    spacing = float(np.spacing(np.float32(abs(exact))))
    return abs(float(actual) - exact) / spacing


def exact_lr(lr):
    """What the averaging sees of a Python float: its digits to twice float32."""
    return Fraction(lr)


def as_double(exact):
    hi = np.float32(float(exact))
    return Double(jnp.float32(hi), jnp.float32(float(exact - Fraction(float(hi)))))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("lr", [1e-12, 0.0025, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("r", [0, 1])
def test_ckp1_is_right_to_two_ulps(count, lr, power, r):
    """From the sum of weights that ``count`` exact steps of constant lr leave."""
    weight = exact_lr(lr) ** power
    if r == 0:
        before, latest, now = count * weight, weight, weight
    else:  # the sum of 1 .. count
        before = Fraction(count * (count + 1), 2) * weight
        latest, now = count * weight, (count + 1) * weight
    # The state knows lr_max as rounded, and what a weight of that would be.
    rounding = Fraction(float(np.float32(lr))) ** power / weight
    average = jax.jit(polynomial_mean(r, power))
    ckp1, weights = average(
        jnp.int32(count),
        double(lr),
        Weights(as_double(before / latest / rounding), jnp.float32(lr)),
    )
    assert ulps(ckp1, now / (before + now)) <= 2
    ratio = Fraction(float(weights.ratio.hi)) + Fraction(float(weights.ratio.lo))
    # A float's digits of what one step changes: over all steps it stays one float's.
    assert abs(ratio / ((before + now) / now / rounding) - 1) < 2**-44 + r * (
        2**-22 / count
    )


def test_the_weight_sum_still_grows_at_1e8():
    """A thousand real steps from there; a float32 sum would not move at all."""
    start, steps, lr = 10**8, 1000, 0.0025
    average = polynomial_mean(0, 2)
    rounding = (Fraction(float(np.float32(lr))) / Fraction(lr)) ** 2

    def body(weights, count):
        ckp1, weights = average(count, double(lr), weights)
        return weights, ckp1

    weights, ckp1 = jax.jit(lambda w: jax.lax.scan(body, w, start + jnp.arange(steps)))(
        Weights(as_double(start / rounding), jnp.float32(lr))
    )
    exact = 1 / Fraction(start + steps)
    assert ulps(ckp1[-1], exact) <= 2
    assert float(weights.ratio.hi) > start


@pytest.mark.parametrize("lr", [1e-12, 1.0, 1e3])
def test_ckp1_over_the_first_steps(lr):
    average = polynomial_mean(0, 2)

    def body(weights, count):
        ckp1, weights = average(count, double(lr), weights)
        return weights, ckp1

    zero = jnp.zeros((), jnp.float32)
    _, ckp1 = jax.lax.scan(
        body, Weights(Double(zero, zero), zero), jnp.arange(10_000, dtype=jnp.int32)
    )
    exact = [Fraction(1, k + 1) for k in range(10_000)]
    assert max(map(ulps, ckp1, exact)) <= 2


def test_ckp1_is_zero_while_nothing_has_weight():
    zero = jnp.zeros((), jnp.float32)
    ckp1, weights = polynomial_mean()(
        jnp.int32(0), double(0.0), Weights(Double(zero, zero), zero)
    )
    assert ckp1 == 0
    assert weights.ratio.hi == 0


def test_ckp1_fades_where_weights_fall_without_end():
    """The exact sum of (k + 1)^-80 is 1 and a rest; float32 holds no W / w so large."""
    average = polynomial_mean(r=-80.0)

    def body(weights, count):
        ckp1, weights = average(count, double(1.0), weights)
        return weights, ckp1

    zero = jnp.zeros((), jnp.float32)
    weights, ckp1 = jax.lax.scan(
        body, Weights(Double(zero, zero), zero), jnp.arange(20, dtype=jnp.int32)
    )
    assert np.isfinite(weights.ratio.hi)  # else the state could not be resumed
    exact = [Fraction(1), Fraction(1, 2**80 + 1)]
    np.testing.assert_allclose(ckp1[:2], list(map(float, exact)), rtol=1e-6)
    np.testing.assert_allclose(ckp1[2:], 0, atol=1e-29)


@pytest.mark.parametrize("b", [0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("count", [0, 1, 10, 10**4, 2**24])
def test_bias_correction(b, count):
    exact = -math.expm1((count + 1) * math.log(b))
    actual = jax.jit(lambda count: one_minus_power(b, count))(jnp.int32(count))
    assert ulps(actual, exact) <= 3


def test_bias_correction_of_zero_momentum():
    assert one_minus_power(0.0, jnp.int32(0)) == 1


def test_warmup_reaches_lr_and_stays():
    step_size = jax.jit(scheduled(0.3, 10))
    for count in range(12):
        exact = Fraction(0.3) * min(1, Fraction(count + 1, 10))
        assert ulps(step_size(jnp.int32(count)).hi, exact) <= 0.5


@pytest.mark.parametrize("b2", [0.6, 0.9, 0.98, 0.999, 0.99999])
@pytest.mark.parametrize("count", [0, 3, 4, 5, 10, 100, 10_000, 2**24])
def test_rho_against_exact_fractions(b2, count):
    t = min(count + 1, 20_000)  # beyond, b2^t has vanished but for the last
    b, steps = Fraction(b2), count + 1
    rho_inf = 2 / (1 - b) - 1
    if t == steps and t <= 200:
        power = b**t
        exact = float(rho_inf - 2 * t * power / (1 - power))
    else:
        power = math.exp(steps * math.log(b2))
        exact = float(rho_inf) - 2 * steps * power / -math.expm1(steps * math.log(b2))
    assert float(rho(b2, jnp.int32(count))) == pytest.approx(exact, rel=2e-6)


def test_rectification_grows_to_one():
    values = [float(rectification(0.999, jnp.int32(k))) for k in (3, 4, 100, 10**6)]
    assert values[0] == 0
    assert 0 < values[1] < values[2] < values[3]
    assert values[3] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_double_arithmetic_carries_twice_the_digits(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.lognormal(sigma=5, size=2)

    def exact(value):
        return Fraction(float(value.hi)) + Fraction(float(value.lo))

    x, y = double(float(a)), double(float(b))
    for function, result in (
        (add, exact(x) + exact(y)),
        (multiply, exact(x) * exact(y)),
        (divide, exact(x) / exact(y)),
    ):
        assert abs(exact(jax.jit(function)(x, y)) / result - 1) < 2**-43


def test_a_large_count_keeps_its_digits():
    value = double(jnp.int32(2**31 - 1))
    assert float(value.hi) + float(value.lo) == 2**31 - 1
