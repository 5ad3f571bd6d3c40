"""State lies where PyTorch looks for it, on its parameter's device, or is refused."""

import copy
import math

import pytest
import schedulefree
import torch
from members import MEMBERS, OVER_A_BASE, build, loss_of, parameters, run, set_gradients
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch_cases import gradients, identical, model_of, values

import sf_torch

# One of each class.
every_member = pytest.mark.parametrize("name", [n for n in MEMBERS if "/" not in n])
SHAPES = [(5, 3), (4,)]

BASES = {
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),  # made with state
    "adam": lambda params: torch.optim.Adam(params, lr=0.02, betas=(0.0, 0.99)),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
    "together": lambda params: sf_torch.CombinedOptimizer(
        torch.optim.RMSprop([params[0]], lr=0.01),
        torch.optim.SGD(params[1:], lr=0.1, momentum=0.5),
    ),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
WRAPPERS = (sf_torch.ScheduleFreeWrapper, sf_torch.ScheduleFreeWrapperReference)
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def started(base, model, wrapper=sf_torch.ScheduleFreeWrapper, **options):
    optimizer = wrapper(base(list(model.parameters())), **options)
    optimizer.train()
    return optimizer


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.step(lambda seed=seed: gradients(model, seed) or 1.0)


# The state of a wrapper


@every_wrapper
@every_base
def test_a_wrapper_keeps_the_moments_of_its_base_beside_z(base, wrapper):
    plain, model = model_of(), model_of()
    alone, optimizer = base(list(plain.parameters())), started(base, model, wrapper)
    alone.step(lambda: gradients(plain, 0) or 1.0)
    train(model, optimizer, range(1))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        state, moments = optimizer.state[p], alone.state.get(q, {})
        assert "z" in state
        assert moments.keys() <= state.keys()
        # The base saw the same gradients at the same place.
        for key, value in moments.items():
            assert identical(state[key], value), key


def test_a_flattened_checkpoint_keeps_the_moments_of_the_base():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    models = model_of(), model_of(seed=1)
    optimizers = [started(BASES["adam"], model) for model in models]
    train(models[0], optimizers[0], range(4))
    model_state, state = get_state_dict(models[0], optimizers[0], options=options)
    set_state_dict(
        models[1],
        optimizers[1],
        model_state_dict=copy.deepcopy(model_state),
        optim_state_dict=copy.deepcopy(state),
        options=options,
    )
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert identical(*states)
    assert states[1][0].keys() == {"y", "z", "step", "exp_avg", "exp_avg_sq"}
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4, 8))
    assert identical(values(models[0]), values(models[1]))


@every_wrapper
@pytest.mark.parametrize("name", ["adagrad", "adam", "together"])
@pytest.mark.parametrize("way", ["state dict", "deepcopy"])
def test_a_wrapper_goes_on_from_what_was_saved(name, wrapper, way):
    models = model_of(), model_of(seed=1)
    optimizer = started(BASES[name], models[0], wrapper)
    train(models[0], optimizer, range(4))
    if way == "state dict":
        other = started(BASES[name], models[1], wrapper)
        train(models[1], other, range(1))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        models[1].load_state_dict(models[0].state_dict())
    else:
        copied, other = copy.deepcopy((models[0], optimizer))
        models = models[0], copied
    for model, each in ((models[0], optimizer), (models[1], other)):
        train(model, each, range(4, 8))
    assert identical(values(models[0]), values(models[1]))
    assert identical(optimizer.state_dict()["state"], other.state_dict()["state"])


class Ftrl(torch.optim.SGD):
    """Has a z of its own, as Follow the Regularised Leader does."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["z"] = torch.zeros_like(p)


def test_a_base_with_a_z_of_its_own_is_refused():
    model = model_of()
    optimizer = started(lambda params: Ftrl(params, lr=0.1), model)
    before = values(model)
    with pytest.raises(RuntimeError, match="Ftrl keeps 'z' in its state"):
        train(model, optimizer, range(1))
    assert identical(values(model), before)
    assert optimizer.param_groups[0]["k"] == 0


# Decay at y, before the base's step


def decaying(module, model):
    base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = module.ScheduleFreeWrapper(base, weight_decay_at_y=0.4, momentum=0.9)
    optimizer.train()
    return optimizer


def test_decay_at_y_is_taken_before_the_bases_step():
    """z' = B(z - lr λ y), with a B that decays too: z - lr (g + λ_B z)."""
    lr, at_y, at_z, b1 = 0.1, 0.4, 0.5, 0.9
    p = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    base = torch.optim.SGD([p], lr=lr, weight_decay=at_z)
    optimizer = sf_torch.ScheduleFreeWrapper(base, weight_decay_at_y=at_y, momentum=b1)
    optimizer.train()
    x = y = z = 2.0
    for k in range(5):
        g = 0.3 * (k - 2)
        p.grad = torch.full_like(p, g)
        optimizer.step()
        z -= lr * at_y * y
        z -= lr * (g + at_z * z)
        x += (z - x) / (k + 1)
        y = (1 - b1) * z + b1 * x
        for ours, right in (
            (optimizer.state[p]["z"], z),
            (optimizer.eval_params()[0], x),
            (p.detach(), y),
        ):
            torch.testing.assert_close(ours, torch.full_like(ours, right))


def test_decay_at_y_is_that_of_metas_wrapper():
    models = model_of(), model_of()
    ours, metas = map(decaying, (sf_torch, schedulefree), models)
    for model, optimizer in zip(models, (ours, metas), strict=True):
        for seed in range(10):
            gradients(model, seed)
            optimizer.step()
    for a, b in zip(values(models[0]), values(models[1]), strict=True):
        # Meta's recovers x anew at every step, and each time rounds it.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Parameters that do not move


@every_member
def test_frozen_parameters_may_have_any_dtype(name):
    frozen = [
        torch.nn.Parameter(torch.arange(4).to(dtype), requires_grad=False)
        for dtype in (torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn)
    ]
    before = [p.clone() for p in frozen]
    (p,), (twin,) = parameters(SHAPES[:1]), parameters(SHAPES[:1])
    optimizer, alone = build(name, [*frozen, p]), build(name, [twin])
    run(optimizer, [p], range(3))
    run(alone, [twin], range(3))
    with optimizer.eval_mode():
        pass
    owners = [q for group in optimizer.param_groups for q in group["params"]]
    xs = dict(zip(owners, optimizer.eval_params(), strict=True))
    for q, old in zip(frozen, before, strict=True):
        assert q.dtype == xs[q].dtype == old.dtype
        assert torch.equal(q.float(), old.float())
        assert torch.equal(xs[q].float(), old.float())
    assert identical(xs[p], alone.eval_params()[0])


@every_member
def test_a_gradient_of_integers_is_refused_before_anything_moves(name):
    integers = torch.nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False)
    params = parameters(SHAPES)
    optimizer = build(name, [{"params": params}, {"params": [integers]}])
    run(optimizer, params, range(2))
    held = [p.detach().clone() for p in params]
    saved = copy.deepcopy(optimizer.state_dict())
    set_gradients(params, 2)
    integers.grad = torch.ones_like(integers)
    with pytest.raises(ValueError, match=r"torch\.int32, which cannot be averaged"):
        optimizer.step(lambda: loss_of(2))
    assert identical([p.detach() for p in params], held)
    assert identical(optimizer.state_dict(), saved)


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree/momentum"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_parameters_train_at_full_precision(name, dtype):
    """Their state is the master, so x and z are those of float32 parameters."""
    start = torch.tensor([1.0, -2.0, 0.5, 4.0])  # which float8 has too
    narrow = torch.nn.Parameter(start.to(dtype))
    wide = torch.nn.Parameter(start.clone())
    optimizers = build(name, [narrow]), build(name, [wide], store_x=True)
    for k in range(4):
        narrow.grad = torch.cos(start + k).to(dtype)
        wide.grad = narrow.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    xs = [optimizer.eval_params(torch.float32)[0] for optimizer in optimizers]
    torch.testing.assert_close(*xs, rtol=0, atol=0)
    assert torch.equal(narrow.detach().float(), wide.detach().to(dtype).float())


# Devices


ACTS = {
    "step": lambda optimizer: optimizer.step(lambda: 1.0),
    "switch": lambda o: o.train() if "Closure" in type(o).__name__ else o.eval(),
    "eval_params": lambda optimizer: optimizer.eval_params(),
}


@pytest.mark.parametrize("act", ACTS)
@every_member
def test_state_follows_its_parameter_to_another_device(name, act):
    """``module.to`` moves parameters; their state is where it was.

    The other device is "meta", which every machine has and whose tensors hold nothing.
    """
    if act == "step" and ("Plus" in name or "Prodigy" in name):
        pytest.skip("its step size is a number, which meta tensors do not have")
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES]
    optimizer = build(
        name, params, **({} if name in OVER_A_BASE else {"foreach": True})
    )
    here = parameters(SHAPES)
    optimizer_here = build(name, here)
    run(optimizer_here, here, range(1))
    for p, q in zip(params, here, strict=True):
        p.grad = torch.empty_like(p)
        optimizer.state[p].update(optimizer_here.state[q])
    for group in optimizer.param_groups:
        group["k"] = 1
    ACTS[act](optimizer)
    arrays = [
        value
        for p in params
        for value in optimizer.state[p].values()
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    assert arrays
    assert all(value.device.type == "meta" for value in arrays)


@every_member
def test_state_that_cannot_be_moved_is_refused_before_anything_moves(name):
    params = parameters(SHAPES)
    optimizer = build(name, [{"params": [p]} for p in params])
    run(optimizer, params, range(2))
    lost = optimizer.state[params[1]]
    lost["z"] = lost["z"].to("meta")  # a device whose tensors hold nothing
    before = [p.detach().clone() for p in params]
    z = optimizer.state[params[0]]["z"].clone()
    for act in (
        lambda: run(optimizer, params, range(2, 3)),
        optimizer.train if "Closure" in name else optimizer.eval,
        optimizer.eval_params,
    ):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            act()
        assert identical([p.detach() for p in params], before)
        assert identical(optimizer.state[params[0]]["z"], z)
        assert [group["k"] for group in optimizer.param_groups] == [2, 2]


# State of optimizers that are not Schedule-Free


@pytest.mark.parametrize("size", [3, 600_000])
@pytest.mark.parametrize(
    "name", [n for n in MEMBERS if n not in OVER_A_BASE and "/" not in n]
)
def test_the_state_of_an_optimizer_that_is_not_schedule_free_is_refused(name, size):
    p = torch.nn.Parameter(torch.ones(size))
    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    theirs.step()
    optimizer = build(name, [p])
    optimizer.step(lambda: 1.0)
    held, saved = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="step, exp_avg, exp_avg_sq and no z"):
        optimizer.load_state_dict(theirs.state_dict())
    assert identical(p.detach(), held)
    assert identical(optimizer.state_dict(), saved)


# ScheduleFree+


@pytest.mark.parametrize("upstream_compatible", [True, False])
def test_a_group_added_late_takes_the_polyak_step_of_all(upstream_compatible):
    """lr_k = lr max(0, f + β Σ g·(z - x)) / ê, with sums and ê over all groups."""
    lr, mean_over, b1, loss = 0.5, 0.9, 0.8, 1.0
    p, late = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = sf_torch.AdamCScheduleFreePlus(
        [p],
        lr=lr,
        polyak_beta=mean_over,
        sf_beta1=b1,
        upstream_compatible=upstream_compatible,
    )
    optimizer.train()
    e = 0.0
    for k in range(13):
        slope, params = (2.0, [p]) if k < 10 else (0.1, [p, late])
        if k == 10:
            optimizer.add_param_group({"params": [late]})
        inner = 0.0
        xs = optimizer.eval_params()
        for q, x in zip(params, xs, strict=True):
            q.grad = torch.full_like(q, slope)
            z = optimizer.state[q].get("z", q.detach())
            inner += b1 * slope * float((z - x).sum())
        size = math.sqrt(math.pi / 2) * slope * 3 * len(params)
        e = mean_over * e + (1 - mean_over) * size
        corrected = e / (1 - mean_over ** (k + 1))
        if upstream_compatible:
            e = corrected  # which the published code keeps as its mean
        optimizer.step_func(function_value=loss)
        right = lr * max(0.0, loss + inner) / corrected
        for group in optimizer.param_groups:
            assert group["scheduled_lr"] == pytest.approx(right, rel=1e-9)


def test_plus_has_one_polyak_beta():
    params = parameters(SHAPES)
    groups = [{"params": [params[0]]}, {"params": [params[1]], "polyak_beta": 0.5}]
    with pytest.raises(ValueError, match=r"polyak_beta must be one .* 0\.9 and 0\.5"):
        sf_torch.AdamCScheduleFreePlus(groups, polyak_beta=0.9)
