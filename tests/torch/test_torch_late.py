"""A parameter whose gradients begin late, or fail to come, has a count of its own.

The bias corrections of a parameter count the gradients that it has had, as in
torch.optim; the averaging weight and the step size count the steps of its group.
"""

import copy
import dataclasses
import io
import warnings
from functools import partial

import numpy as np
import pytest
import schedulefree
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import sf_torch
from parity_tests.reference import ScheduleFree
from parity_tests.registry import OPTIMIZERS
from sf_torch._step import fused

LR = 0.01
MEMBERS = {
    "adamw": partial(sf_torch.AdamWScheduleFree, lr=LR),
    "adamw_momentum": partial(sf_torch.AdamWScheduleFree, lr=LR, inner_momentum=0.9),
    "adamw_reference": partial(sf_torch.AdamWScheduleFreeReference, lr=LR),
    "adamw_paper": partial(sf_torch.AdamWScheduleFreePaper, lr=LR),
    "adamw_algoperf": partial(sf_torch.AdamWScheduleFreeAlgoPerf, lr=LR),
    "refined": partial(sf_torch.AdamWScheduleFreeRefined, lr=LR, refined_c=5.0),
    "radam": partial(sf_torch.RAdamScheduleFree, lr=LR),
    "gpa": partial(sf_torch.GPAAdamW, lr=LR),
    "plus": partial(sf_torch.AdamCScheduleFreePlus, lr=LR),
}
members = pytest.mark.parametrize("build", MEMBERS.values(), ids=MEMBERS.keys())
fuses = pytest.mark.skipif(
    not fused.works_on(torch.device("cpu")), reason="Triton's interpreter is off"
)
# How the tensors are moved; the sizes decide too, on a CPU.
WAYS = {
    "one_by_one": ({"foreach": False}, 5),
    "together": ({}, 5),
    "one_pass": ({}, 2**16),
    "fused": ({"fused": True}, 5),
    "capturable": ({"capturable": True}, 5),
}


def pair(size=5):
    return [torch.nn.Parameter(torch.zeros(size)) for _ in range(2)]


def step(optimizer, params, k, since):
    """Parameter i has a gradient in the steps that ``since[i]`` holds of."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * k + i)
        grad = torch.rand(p.shape, generator=generator) - 0.4
        p.grad = grad.to(p.dtype) if since[i](k) else None
    optimizer.step(lambda: 1.0)


def always(k):
    return True


def with_gaps(k):
    return k >= 4 and k % 3 != 0


@pytest.mark.parametrize(
    "way", [*WAYS][:3] + [pytest.param(w, marks=fuses) for w in [*WAYS][3:]]
)
@members
def test_the_first_step_is_as_long_as_ever_however_late(build, way):
    options, size = WAYS[way]
    if way == "capturable" and build.func in (
        sf_torch.GPAAdamW,
        sf_torch.AdamCScheduleFreePlus,
    ):
        pytest.skip("has no such argument")
    first, late = params = pair(size)
    optimizer = build(params, **options)
    optimizer.train()
    # In mid-run, without the hundreds of steps that it takes to come there.
    step(optimizer, params, 0, (always, lambda k: False))
    for _ in range(20):
        first.grad = torch.full_like(first, 0.01)
        optimizer.step(lambda: 1.0)
    late.grad = torch.full_like(late, 0.3)
    optimizer.step(lambda: 1.0)
    # With v = (1 - b2) g² and a correction of 1 - b2, Adam's direction is g / |g|.
    lr = float(optimizer.param_groups[0]["scheduled_lr"])
    expected = LR if "Paper" in build.func.__name__[-5:] else lr
    z = optimizer.state[late]["z"]
    torch.testing.assert_close(z, torch.full_like(z, -expected), rtol=1e-5, atol=0)


REGISTRY = {
    name: row
    for name, row in OPTIMIZERS.items()
    if name in ("sgd", "wrapper", "refined", "gpa", "plus") or "adam" in name
}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_optimizer_follows_the_reference_through_gaps(name):
    row = REGISTRY[name]
    options = row.options(
        lr=0.02, b2=0.99, weight_decay=0.1, silent_sgd_phase=False, inner_momentum=0.5
    )
    if name in ("radam", "sgd", "wrapper", "refined"):  # no momentum of their own
        options = dataclasses.replace(options, inner_momentum=0.0)
    start = {"a": np.linspace(-1, 1, 5), "b": np.linspace(0.5, 1, 5)}
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in start.items()}
    group = {"params": list(params.values()), **row.arguments(options)}
    optimizer = row.torch([group], options, "", False)
    optimizer.train()
    truth = ScheduleFree(start, [(tuple(start), row.reference(options))])
    for k in range(16):
        step(optimizer, params.values(), k, (always, with_gaps))
        truth.step(
            {
                n: p.grad if p.grad is None else p.grad.numpy()
                for n, p in params.items()
            },
            1.0,
        )
    xs = dict(zip(params, optimizer.eval_params(), strict=True))
    for n, p in params.items():
        for ours, right in ((p, truth.y), (xs[n], truth.x)):
            np.testing.assert_allclose(ours.detach(), right[n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["", "Reference", "Paper"])
@pytest.mark.parametrize("family", ["AdamW", "RAdam"])
def test_upstream_compatible_has_the_numbers_of_the_published_package(family, form):
    name = f"{family}ScheduleFree{form}"
    if not hasattr(schedulefree, name):
        pytest.skip("there is no such form")
    ends = []
    for package, extra in (
        (schedulefree, {}),
        (sf_torch, {"upstream_compatible": True}),
    ):
        params = pair()
        optimizer = getattr(package, name)(params, lr=0.02, weight_decay=0.1, **extra)
        optimizer.train()
        for k in range(12):
            step(optimizer, params, k, (always, with_gaps))
        ends.append([p.detach() for p in params])
    for theirs, ours in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def continued(build, copied):
    """The parameters after 14 steps; the last 6 by a fresh optimizer, if any."""
    params = pair()
    optimizer = build(params)
    optimizer.train()
    for k in range(14):
        if k == 8 and copied is not None:
            former, optimizer = optimizer, build(params)
            optimizer.train()
            copied(former, optimizer)
        step(optimizer, params, k, (always, with_gaps))
    return [p.detach() for p in params]


def through_a_file(former, optimizer):
    file = io.BytesIO()
    torch.save(former.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def flattened(former, optimizer):
    """As distributed checkpoints hold it: by parameter and key, into a fresh state."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.ParameterList(former.param_groups[0]["params"])
    saved = get_optimizer_state_dict(model, former, options=options)
    former.zero_grad()  # where there are gradients, PyTorch begins no state
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved), options=options)


@pytest.mark.parametrize("copied", [through_a_file, flattened])
@members
def test_the_counts_are_saved(build, copied):
    whole = continued(build, None)
    parted = continued(build, copied)
    assert all(map(torch.equal, whole, parted))


def test_a_state_of_the_published_package_has_taken_every_step():
    params = pair()
    theirs = schedulefree.AdamWScheduleFree(params, lr=0.02)
    theirs.train()
    for k in range(5):
        step(theirs, params, k, (always, always))
    saved = theirs.state_dict()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = sf_torch.AdamWScheduleFree(twins, lr=0.02)
    ours.train()
    ours.load_state_dict(copy.deepcopy(saved))
    for k in range(5, 10):
        step(theirs, params, k, (always, always))
        step(ours, twins, k, (always, always))
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@fuses
@pytest.mark.parametrize("way", ["fused", "capturable"])
@pytest.mark.parametrize("name", ["adamw_momentum", "adamw_paper", "radam"])
def test_the_kernel_takes_the_same_steps_through_gaps(name, way):
    ends = []
    for options in ({"fused": False}, {way: True}):
        params = pair()
        optimizer = MEMBERS[name](params, **options)
        optimizer.train()
        for k in range(14):
            step(optimizer, params, k, (always, with_gaps))
        ends.append(params)
    for plain, kernel in zip(*ends, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_momentum", "adamw_paper"])
def test_a_compiled_step_takes_the_same_steps_through_gaps(name):
    torch.compiler.reset()
    ends = []
    for compiled in (False, True):
        params = pair()
        optimizer = MEMBERS[name](params)
        optimizer.train()
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        with warnings.catch_warnings():
            # torch.optim's own profiling hook, which the compiler leaves out.
            warnings.filterwarnings("ignore", "Profiler function")
            for k in range(8):
                step(optimizer, params, k, (always, with_gaps))
        ends.append(params)
    for plain, fast in zip(*ends, strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-6, atol=2e-7)
