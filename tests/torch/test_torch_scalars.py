"""The scalars of a step in Python floats and in float64 tensors, against Fractions."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

import sf_torch
from sf_torch._step.schedule import (
    one_minus_power,
    polynomial_weight,
    rectification,
    warmed_up,
)

COUNTS = (10, 10**4, 2**24, 10**8)
FORMS = [float, lambda value: torch.tensor(value, dtype=torch.float64)]
FORM_IDS = ["number", "tensor"]


def ulps(actual, exact):
    """In units in the last place of float32."""
    exact = float(exact)
    return abs(float(actual) - exact) / float(np.spacing(np.float32(abs(exact))))


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("lr", [1e-12, 0.0025, 1e3])
@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("r", [0, 1])
def test_ckp1_is_right_to_two_ulps(count, lr, power, r, form):
    """From the weight sum that ``count`` exact steps of constant lr leave behind."""
    weight = Fraction(lr) ** power
    if r == 0:
        before, now = count * weight, weight
    else:  # the sum of 1 .. count
        before, now = Fraction(count * (count + 1), 2) * weight, (count + 1) * weight
    group = {"k": form(count), "weight_sum": form(float(before)), "lr_max": form(lr)}
    ckp1 = polynomial_weight(group, form(lr), r, power)
    assert ulps(ckp1, now / (before + now)) <= 2
    assert abs(float(group["weight_sum"]) / float(before + now) - 1) < 1e-14


@pytest.mark.parametrize("count", COUNTS)
def test_a_step_from_a_large_count_uses_that_ckp1(count):
    """Seen from outside: how far z' moved x, once W stands for ``count`` steps."""
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = sf_torch.SGDScheduleFree([p], lr=1.0, momentum=0.0)
    optimizer.train()
    group = optimizer.param_groups[0]
    group.update(k=count, weight_sum=float(count), lr_max=1.0)
    p.grad = torch.tensor(-1.0)
    optimizer.step()
    assert ulps(optimizer.eval_params()[0], Fraction(1, count + 1)) <= 2
    assert group["k"] == count + 1


def test_the_weight_sum_still_grows_at_1e8():
    start, steps, lr = 10**8, 1000, 0.0025
    group = {"k": start, "weight_sum": float(start * Fraction(lr) ** 2), "lr_max": lr}
    for _ in range(steps):
        ckp1 = polynomial_weight(group, lr, 0, 2)
        group["k"] += 1
    assert ulps(ckp1, Fraction(1, start + steps)) <= 2


def test_the_count_goes_on_where_an_int32_would_wrap():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sf_torch.AdamWScheduleFree([p], lr=0.1, warmup_steps=10)
    optimizer.train()
    group = optimizer.param_groups[0]
    group.update(k=2**31 - 1, weight_sum=0.01 * 2**31, lr_max=0.1)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert group["k"] == 2**31 + 1
    assert p.isfinite().all()


def test_ckp1_is_zero_while_nothing_has_weight():
    group = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
    assert polynomial_weight(group, 0.0, 0.0, 2.0) == 0
    assert group["weight_sum"] == 0


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("b", [0.5, 0.9, 0.999, 0.99999, 1 - 2**-24])
@pytest.mark.parametrize("count", [0, 1, 10, 10**4, 2**24, 10**8])
def test_bias_correction(b, count, form):
    with localcontext(prec=60):
        exact = float(1 - Decimal(b) ** (count + 1))
    assert float(one_minus_power(b, form(count))) == pytest.approx(exact, rel=1e-14)


def test_bias_correction_of_zero_momentum():
    assert one_minus_power(0.0, 0) == 1


def test_warmup_reaches_lr_and_stays():
    for count in range(12):
        exact = Fraction(0.3) * min(1, Fraction(count + 1, 10))
        assert warmed_up(0.3, count, 10) == pytest.approx(float(exact), rel=1e-15)
    assert warmed_up(0.3, 10, 10) == 0.3


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("b2", [0.7, 0.9, 0.98, 0.999, 0.9999, 0.99999])
def test_rectification_against_exact_numbers(b2, form):
    """To 1e-9, although ρ∞ and what is taken off it are nearly equal for small t."""
    with localcontext(prec=60):
        b = Decimal(b2)
        rho_inf = 2 / (1 - b) - 1
        for t in (*range(1, 40), 10**3, 10**4, 10**6, 2**24, 10**8):
            rho = rho_inf - 2 * t * b**t / (1 - b**t)
            rectified, factor = rectification(b2, form(t - 1))
            assert bool(rectified) == (rho > 4)
            if rectified:
                numerator = (rho - 4) * (rho - 2) * rho_inf
                squared = numerator / ((rho_inf - 4) * (rho_inf - 2) * rho)
                exact = float(squared.sqrt())
                assert float(factor) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("b2", [0.0, 1 / 3, 0.5, 0.6])
def test_b2_too_small_for_rectification_divides_by_nothing(b2):
    """ρ never exceeds ρ∞ = 2 / (1 - b2) - 1, which is 4 at b2 = 0.6."""
    for k in (0, 3, 100):
        rectified, factor = rectification(b2, k)
        assert not rectified
        assert math.isfinite(factor)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = sf_torch.RAdamScheduleFree(
        [p], lr=0.1, betas=(0.9, b2), silent_sgd_phase=False
    )
    optimizer.train()
    p.grad = torch.ones(2)
    optimizer.step()
    assert p.isfinite().all()
