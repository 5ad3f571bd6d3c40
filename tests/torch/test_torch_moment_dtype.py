"""Moments keep the precision of float32, whatever ``state_dtype`` says of z and x."""

from functools import partial

import pytest
import torch

import sf_torch

LR, B2 = 0.01, 0.99
MEMBERS = {
    "adamw": partial(
        sf_torch.AdamWScheduleFree, lr=LR, betas=(0.9, B2), inner_momentum=0.9
    ),
    "adamw_reference": partial(
        sf_torch.AdamWScheduleFreeReference, lr=LR, betas=(0.9, B2)
    ),
    "radam": partial(sf_torch.RAdamScheduleFree, lr=LR, betas=(0.9, B2)),
    "gpa": partial(sf_torch.GPAAdamW, lr=LR, betas=(0.9, B2)),
    "plus": partial(sf_torch.AdamCScheduleFreePlus, lr=LR, betas=(0.9, B2)),
}
members = pytest.mark.parametrize("build", MEMBERS.values(), ids=MEMBERS.keys())


def trained(build, steps, dtype=torch.float32, **options):
    """After gradients of 1 only."""
    p = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = build([p], **options)
    optimizer.train()
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step(lambda: 1.0)
    return optimizer.state[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@members
def test_a_narrow_state_leaves_the_moments_exact(build, dtype):
    state = trained(build, 200, dtype, state_dtype=torch.bfloat16)
    assert state["z"].dtype == torch.bfloat16
    moments = {"exp_avg_sq": B2, "exp_avg": 0.9}
    for key in moments.keys() & state.keys():
        assert state[key].dtype == torch.float32
        # The running mean of ones: a bfloat16 one stalls far below.
        right = torch.full((4,), 1 - moments[key] ** 200)
        torch.testing.assert_close(state[key], right, rtol=1e-5, atol=0)


@members
def test_moment_dtype_narrows_the_moments_alone(build):
    state = trained(build, 3, moment_dtype=torch.bfloat16)
    assert state["z"].dtype == torch.float32
    keys = {"exp_avg_sq", "exp_avg"} & state.keys()
    assert keys
    assert all(state[key].dtype == torch.bfloat16 for key in keys)


@pytest.mark.parametrize("name", ["AlgoPerf", "AlgoPerfV2"])
def test_a_float16_v_waits_gradients_of_0_out(name):
    """1e-8, the eps of the entry, is 0 in float16, and 0 / 0 is NaN."""
    p = torch.nn.Parameter(torch.ones(4))
    make = getattr(sf_torch, f"AdamWScheduleFree{name}")
    optimizer = make([p], lr=LR, moment_dtype=torch.float16)
    optimizer.train()
    for gradient in (0.0, 1e-5):  # whose square is 0 too
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        assert ((p > 1 - LR) & (p <= 1)).all()


def test_by_default_moments_are_as_wide_as_the_parameters():
    for param, moment in (
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
    ):
        state = trained(MEMBERS["adamw"], 1, param)
        assert {state[key].dtype for key in ("exp_avg_sq", "exp_avg")} == {moment}


def test_a_state_with_narrow_moments_from_before_is_widened():
    p = torch.nn.Parameter(torch.ones(4))
    before, after = (
        MEMBERS["adamw"]([p], state_dtype=torch.bfloat16, **options)
        for options in ({"moment_dtype": torch.bfloat16}, {})
    )
    before.train()
    p.grad = torch.ones_like(p)
    before.step()
    saved = before.state_dict()
    del saved["param_groups"][0]["moment_dtype"]
    after.load_state_dict(saved)
    after.step()
    assert after.state[p]["exp_avg_sq"].dtype == torch.float32


def test_what_is_no_floating_dtype_is_refused():
    with pytest.raises(ValueError, match="moment_dtype must be None or a floating"):
        MEMBERS["adamw"]([torch.nn.Parameter(torch.ones(4))], moment_dtype=torch.int8)
