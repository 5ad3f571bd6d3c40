"""skip_nonfinite: a step with a gradient that is not finite leaves all as it was."""

import copy

import pytest
import torch
from members import MEMBERS, build, loss_of, parameters, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import identical

import sf_torch
from sf_torch._step import fused
from sf_torch._step.finite import not_finite

SHAPES = [(3, 2), (4,), (0, 3), ()]
BROKEN = {1: float("nan"), 2: float("inf"), 4: float("-inf")}
needs_triton = pytest.mark.skipif(
    not fused.works_on(torch.device("cpu")), reason="needs Triton's interpreter"
)


def train(optimizer, params, broken, missing=None, each=None):
    """Seven steps; those in ``broken`` have one such value in a gradient, or are left
    out where it is None."""
    for k in range(7):
        set_gradients(params, k)
        params[1].grad[2] = BROKEN.get(k, params[1].grad[2])
        if k == missing:
            params[0].grad = None
        if each is not None:
            each(optimizer, k)
        if broken or k not in BROKEN:
            optimizer.step(lambda k=k: loss_of(k))


def held(optimizer, params):
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state |= {"missed": int(state.get("missed", 0))}  # a tensor once it has moved
    return [[p.detach() for p in params], saved]


def ends(name, broken, each=None, missing=None, **options):
    params = parameters(SHAPES)
    optimizer = build(name, params, **options)
    train(optimizer, params, broken, missing, each)
    return held(optimizer, params)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_run_is_the_one_without_the_broken_steps(name):
    skipping = ends(name, broken=True, skip_nonfinite=True)
    assert identical(skipping, ends(name, broken=False, skip_nonfinite=True))
    assert skipping[1]["param_groups"][0]["k"] == 4


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "AdamCScheduleFreePlus"])
def test_without_it_one_broken_gradient_is_enough(name):
    ys, saved = ends(name, broken=True)
    assert ys[1].isnan().any()
    assert saved["state"][1]["z"].isnan().any()


@needs_triton
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("SGDScheduleFree", None),
        ("AdamWScheduleFree/momentum", 2),
        ("RAdamScheduleFree", 3),
    ],
)
def test_on_the_device_too(name, missing):
    """With a parameter that has no gradient in a step, broken or not."""
    options = {"capturable": True, "skip_nonfinite": True, "missing": missing}
    ys, saved = ends(name, broken=True, **options)
    right_ys, right = ends(name, broken=False, **options)
    assert identical(ys, right_ys)
    assert identical(saved, right)


@needs_triton
def test_a_broken_first_step_on_the_device_leaves_the_counters_as_they_began():
    params = parameters(SHAPES)
    options = {"capturable": True, "skip_nonfinite": True}
    optimizer = build("AdamWScheduleFree", params, **options)
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    group = optimizer.param_groups[0]
    assert [float(group[key]) for key in ("k", "weight_sum", "lr_max")] == [0, 0, -1]
    assert identical([p.detach() for p in params], before)


class NoAnswers(TorchDispatchMode):
    """The host must not wait for a value of the device within the block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@needs_triton
def test_the_host_does_not_wait_for_the_answer_of_a_capturable_step(monkeypatch):
    params = parameters(SHAPES)
    options = {"capturable": True, "skip_nonfinite": True}
    optimizer = build("AdamWScheduleFree", params, **options)
    train(optimizer, params, broken=True)
    # The launch itself is Triton's, whose interpreter reads what it likes.
    monkeypatch.setattr(sf_torch._step.fused.Kernel, "_launch", lambda *_, **__: None)
    with NoAnswers():
        optimizer.step()


def change_beta(optimizer, k):
    if k == 4:  # a broken one
        optimizer.param_groups[0]["betas"] = (0.5, 0.999)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"capturable": True}, marks=needs_triton)], ids=str
)
def test_a_beta_that_changes_in_a_broken_step_changes_in_the_next(options):
    options = {"each": change_beta, "skip_nonfinite": True, **options}
    skipping = ends("AdamWScheduleFree", broken=True, **options)
    assert identical(skipping, ends("AdamWScheduleFree", broken=False, **options))
    assert skipping[1]["param_groups"][0]["b1"] == 0.5


def test_gradients_stay_as_they_were():
    params = parameters(SHAPES)
    optimizer = build("AdamWScheduleFree", params, skip_nonfinite=True)
    set_gradients(params, 0)
    params[0].grad[0, 0] = float("inf")
    grads = copy.deepcopy([p.grad for p in params])
    optimizer.step()
    assert identical([p.grad for p in params], grads)


def test_a_group_may_look_for_all():
    params = parameters(SHAPES)
    groups = [{"params": [p], "skip_nonfinite": i == 1} for i, p in enumerate(params)]
    optimizer = sf_torch.SGDScheduleFree(groups)
    optimizer.train()
    train(optimizer, params, broken=True)
    assert [group["k"] for group in optimizer.param_groups] == [4] * len(params)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_value_that_is_not_finite_is_found_and_no_large_one(dtype, value):
    largest = torch.finfo(dtype).max
    grads = [torch.full((2, 3), largest, dtype=dtype), torch.empty(0), None]
    if dtype.is_complex:
        grads[0] = torch.complex(*[grads[0].real] * 2)
    assert not not_finite(grads)
    assert not not_finite([*grads, torch.ones(3, dtype=torch.float64)])
    grads[0][1, 2] = complex(0, value) if dtype.is_complex else value
    assert not_finite(grads)
    assert not_finite([torch.ones(3, dtype=torch.float64), *grads])
    assert not not_finite([None])
