"""Averaging weights that no double holds: c_k depends on their ratios alone."""

from decimal import Decimal, localcontext

import pytest
import torch

import sf_torch
from sf_torch._step.schedule import polynomial_weight

FORMS = [float, lambda value: torch.tensor(value, dtype=torch.float64)]


def exact_ckp1(lrs, r, power):
    """w / W at each step, with w as large or small as it likes."""
    with localcontext(prec=50):
        total, lr_max = Decimal(0), Decimal(0)
        for k, lr in enumerate(lrs):
            lr_max = max(lr_max, Decimal(lr))
            weight = Decimal(k + 1) ** Decimal(r) * lr_max ** Decimal(power)
            total += weight
            yield float(weight / total)


def ckp1s(lrs, r, power, form=float):
    group = {"k": form(0), "weight_sum": form(0.0), "lr_max": form(-1.0)}
    for lr in lrs:
        yield float(polynomial_weight(group, form(lr), r, power))
        group["k"] = group["k"] + 1


@pytest.mark.parametrize("form", FORMS, ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("r", "power"), [(0, 2), (0.5, 0), (10, 2), (100, 20), (0, 40)]
)
@pytest.mark.parametrize("lr", [1e-30, 0.0025, 1e30])
def test_ckp1_does_not_depend_on_the_size_of_weights(lr, r, power, form):
    """Through both ends: 2^500 is passed at step 32 with r = 100."""
    lrs = [lr * min(1.0, (k + 1) / 10) for k in range(100)]
    actual = [*ckp1s(lrs, r, power, form)]
    assert actual == pytest.approx([*exact_ckp1(lrs, r, power)], rel=1e-11)


def test_a_growing_lr_leaves_and_enters_the_range():
    lrs = [10.0 ** (k - 30) for k in range(61)]
    for power in (2, 8, 20):
        actual = [*ckp1s(lrs, 1, power)]
        assert actual == pytest.approx([*exact_ckp1(lrs, 1, power)], rel=1e-11)


def test_within_the_range_weight_sum_is_the_sum_of_weights():
    """As in Meta's checkpoints."""
    group = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}
    for k in range(20):
        group["k"] = k
        polynomial_weight(group, 0.1, 2, 2)
    expected = 0.01 * sum(t**2 for t in range(1, 21))
    assert group["weight_sum"] == pytest.approx(expected, rel=1e-14)


def test_a_huge_power_makes_no_huge_integer():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = sf_torch.SGDScheduleFree([p], lr=0.1, r=10**12)
    optimizer.train()
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    # Each step outweighs all before it, so x is z.
    assert optimizer.eval_params()[0] == pytest.approx(0.7)
