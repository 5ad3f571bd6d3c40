"""What training loops do to an optimizer: AMP, accumulation, compiling, schedulers."""

import copy
import io
import pickle
import shutil
import warnings

import pytest
import torch
from torch_cases import (
    ALL,
    FORMS,
    NAMED,
    every,
    forms,
    gradients,
    identical,
    model_of,
    same,
    started,
    step,
    values,
)

import sf_torch

# Copies


@every
@pytest.mark.parametrize("method", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_as_the_original(build, method):
    model = model_of()
    optimizer = started(build, model, steps=3)
    if method == "state_dict":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin = copy.deepcopy(model)
        other = started(build, twin)
        other.load_state_dict(torch.load(file, weights_only=True))
    elif method == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    else:
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert identical(other.state_dict(), optimizer.state_dict())
    for m, o in ((model, optimizer), (twin, other)):
        for seed in range(3, 6):
            step(m, o, seed)
    assert same(values(twin), values(model))
    assert same(other.eval_params(), optimizer.eval_params())
    step(model, optimizer, 6)
    assert not same(values(twin), values(model))


@pytest.mark.parametrize("method", ["deepcopy", "pickle"])
def test_a_copied_wrapper_shares_groups_with_its_own_base(method):
    optimizer = FORMS["wrapper"](model_of().parameters())
    if method == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer))
    assert optimizer.param_groups is optimizer.base.param_groups
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.base.param_groups[0]["lr"] == 0.5


def test_a_copy_made_in_eval_mode_returns_to_the_same_y():
    model = model_of()
    optimizer = started(sf_torch.SGDScheduleFree, model, steps=3)
    y = values(model)
    optimizer.eval()
    twin, other = copy.deepcopy((model, optimizer))
    other.train()
    assert same(values(twin), y)


# Mixed precision and accumulation


# GradScaler takes no closure.
@pytest.mark.parametrize("name", [name for name in ALL if "Closure" not in name])
def test_a_skipped_amp_step_changes_nothing(name):
    model = model_of()
    optimizer = started(ALL[name], model, steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    before = copy.deepcopy([values(model), optimizer.state_dict()])
    gradients(model, 0)
    model[0].bias.grad[1] = float("inf")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert identical([values(model), optimizer.state_dict()], before)
    assert scaler.get_scale() == 2.0
    gradients(model, 0)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.param_groups[0]["k"] == 3


def test_amp_with_finite_gradients_takes_the_unscaled_step():
    models = model_of(), model_of()
    scaled, plain = (started(sf_torch.AdamWScheduleFree, m) for m in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        scaler.scale(models[0](inputs).square().mean()).backward()
        scaler.step(scaled)
        scaler.update()
        models[1](inputs).square().mean().backward()
        plain.step()
        for optimizer in (scaled, plain):
            optimizer.zero_grad()
    assert same(values(models[0]), values(models[1]))  # powers of two scale exactly


def test_accumulated_gradients_are_one_step():
    w = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizers = [sf_torch.AdamWScheduleFree([p], lr=0.1) for p in w]
    for optimizer in optimizers:
        optimizer.train()
    for micro in range(6):
        (w[0] * (micro + 1)).sum().backward()
        if micro % 3 == 2:
            optimizers[0].step()
            optimizers[0].zero_grad()
    for total in (1 + 2 + 3, 4 + 5 + 6):
        (w[1] * total).sum().backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert torch.equal(*w)
    assert optimizers[0].param_groups[0]["k"] == 2


@every
def test_gradients_are_left_as_they_were(build):
    model = model_of()
    optimizer = started(build, model)
    gradients(model, 0)
    grads = [p.grad for p in model.parameters()]
    expected = [g.clone() for g in grads]
    optimizer.step(lambda: None)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert same(grads, expected)


# torch.compile


COMPILED = {
    "SGDScheduleFree": {"warmup_steps": 4, "decay_at": "x"},
    "AdamWScheduleFree": {"warmup_steps": 4, "inner_momentum": 0.5},
    "AdamWScheduleFreePaper": {},
    "RAdamScheduleFree": {},
    "AdamWScheduleFreeReference": {"warmup_steps": 4},
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_compiled_once(name):
    compiled, plain = model_of(), model_of()
    options = COMPILED[name]
    optimizers = [
        started(NAMED[name], model, weight_decay=0.1, **options)
        for model in (compiled, plain)
    ]
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    torch.compiler.reset()
    fast = torch.compile(optimizers[0].step, backend=backend)
    with warnings.catch_warnings():
        # torch.optim's own profiling hook, which the compiler leaves out.
        warnings.filterwarnings("ignore", "Profiler function")
        for seed in range(8):
            gradients(compiled, seed)
            fast()
            step(plain, optimizers[1], seed)
    assert len(programs) == 1
    for a, b in zip(values(compiled), values(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
    assert optimizers[0].param_groups[0]["k"] == 8


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
# Inductor imports the deprecated torch.jit of its own package.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_step_compiled_by_inductor_takes_the_same_steps():
    compiled, plain = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizers = [sf_torch.AdamWScheduleFree([p], lr=0.1) for p in (compiled, plain)]
    torch.compiler.reset()
    steps = torch.compile(optimizers[0].step), optimizers[1].step
    for value in range(4):
        for p, optimizer, take in zip(
            (compiled, plain), optimizers, steps, strict=True
        ):
            optimizer.train()
            p.grad = torch.linspace(-1, 1, 5) * (value + 1)
            take()
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-7)


# Learning rates


@every
def test_lr_as_a_tensor_gives_the_same_steps(build):
    models = model_of(), model_of()
    for model, lr in zip(
        models, (0.1, torch.tensor(0.1, dtype=torch.float64)), strict=True
    ):
        started(build, model, steps=4, lr=lr)
    assert same(values(models[0]), values(models[1]))


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=8, cycle_momentum=False
    ),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=2),
            torch.optim.lr_scheduler.ConstantLR(o),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_schedulers_of_torch_set_the_step_size(schedule, name, kind):
    model = model_of()
    optimizer = started(ALL[name], model, lr=kind(0.1))
    scheduler = schedule(optimizer)
    for seed in range(5):
        (lr,) = (float(group["lr"]) for group in optimizer.param_groups)
        step(model, optimizer, seed)
        assert optimizer.param_groups[0]["scheduled_lr"] == lr
        scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) != pytest.approx(0.1)


# Hooks, groups, parameters that come and go


@every
def test_step_hooks_run_around_the_step(build):
    model = model_of()
    optimizer = started(build, model)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["k"]))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["k"]))
    step(model, optimizer, 0)
    assert seen == [0, 1]


def test_groups_have_their_own_options():
    model, twins = model_of(), [model_of(), model_of()]
    groups = [
        {"params": model[0].parameters(), "lr": 0.3, "betas": (0.5, 0.9)},
        {"params": [*model[1].parameters(), *model[2].parameters()]},
    ]
    started(lambda _, **o: sf_torch.AdamWScheduleFree(groups, **o), model, steps=4)
    for twin, options in zip(
        twins, ({"lr": 0.3, "betas": (0.5, 0.9)}, {}), strict=True
    ):
        started(sf_torch.AdamWScheduleFree, twin, steps=4, **options)
    assert same(values(model[0]), values(twins[0][0]))
    assert same(values(model[2]), values(twins[1][2]))


@forms
def test_a_parameter_without_gradient_stays_and_may_begin_later(build):
    model = model_of()
    optimizer = build(model.parameters())
    optimizer.train()
    late = model[2].weight
    before = late.detach().clone()
    for seed in range(3):
        gradients(model, seed)
        late.grad = None
        optimizer.step()
    assert torch.equal(late, before)
    with optimizer.eval_mode():
        assert torch.equal(late, before)
    gradients(model, 3)
    optimizer.step()
    assert not torch.equal(late, before)
    optimizer.eval()
    # Its x is the average of z by the group's weights: a quarter of this step.
    z = optimizer.state[late]["z"]
    torch.testing.assert_close(late.detach(), 0.75 * before + 0.25 * z)


def test_frozen_parameters_stay_and_thawed_ones_begin():
    model = model_of()
    model[0].requires_grad_(False)
    before = values(model[0])
    optimizer = started(sf_torch.AdamWScheduleFree, model)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for thaw in (False, True):
        model[0].requires_grad_(thaw)
        model(inputs).square().mean().backward()
        optimizer.step()
        with optimizer.eval_mode():
            assert same(values(model[0]), before) is not thaw


@every
def test_a_group_added_later_trains(build):
    model, more = model_of(), torch.nn.Linear(2, 1)
    optimizer = started(build, model, steps=2)
    optimizer.add_param_group({"params": list(more.parameters())})
    before = values(more)
    gradients(model, 2)
    gradients(more, 2)
    optimizer.step(lambda: None)
    assert [group["k"] for group in optimizer.param_groups] == [3, 1]
    assert not any(torch.equal(a, b) for a, b in zip(values(more), before, strict=True))
