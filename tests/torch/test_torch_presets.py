"""Muon and Prodigy by their own names, and what the wrapper gives to every base."""

import copy
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch

import sf_jax
import sf_torch
from parity_tests import reference

SHAPES = {"matrix": (3, 4), "bias": (3,), "other": (2, 2)}


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype))
        for name, s in SHAPES.items()
    }


def gradient(k, name):
    rng = np.random.default_rng([k, *map(ord, name)])
    return rng.standard_normal(SHAPES[name])


def take(optimizer, params, ks):
    for k in ks:
        for name, p in params.items():
            p.grad = torch.tensor(gradient(k, name), dtype=p.dtype)
        optimizer.step()


def over_sgd(params, **options):
    base = torch.optim.SGD([*params.values()], lr=0.1)
    optimizer = sf_torch.ScheduleFreeWrapper(base, **options)
    optimizer.train()
    return optimizer


def reference_run(groups, steps):
    """x and y of SGD under the rule; groups: names, lr_k, λ at y, r, power."""
    start = {name: p.detach().numpy() for name, p in weights().items()}
    seams = [
        (
            names,
            reference.Seams(
                lambda k: 0.9,
                step_size,
                reference.SGD(decay),
                reference.PolynomialAverage(r, power),
            ),
        )
        for names, step_size, decay, r, power in groups
    ]
    rule = reference.ScheduleFree(start, seams)
    for k in range(steps):
        rule.step({name: gradient(k, name) for name in SHAPES})
    return rule


def assert_is(optimizer, params, rule):
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    xs = dict(zip(map(id, owners), optimizer.eval_params(), strict=True))
    for name, p in params.items():
        for ours, right in ((p.detach(), rule.y[name]), (xs[id(p)], rule.x[name])):
            np.testing.assert_allclose(ours, right, rtol=0, atol=1e-12)


# Warmup


@pytest.mark.parametrize("warmup_steps", [0, 1, 5, 100])
def test_base_decay_and_average_see_the_warmed_lr(warmup_steps):
    params = weights()
    optimizer = over_sgd(
        params, warmup_steps=warmup_steps, weight_decay_at_y=0.3, r=0.5
    )
    take(optimizer, params, range(12))
    warmup = reference.warmup(lambda k: 0.1, warmup_steps)
    assert_is(optimizer, params, reference_run([([*SHAPES], warmup, 0.3, 0.5, 2)], 12))


def test_warmup_multiplies_the_lr_that_a_scheduler_sets():
    params = weights()
    optimizer = over_sgd(params, warmup_steps=4)
    for k in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
        take(optimizer, params, [k])
        assert optimizer.param_groups[0]["lr"] == 0.1 / (k + 1)
    warmup = reference.warmup(lambda k: 0.1 / (k + 1), 4)
    assert_is(optimizer, params, reference_run([([*SHAPES], warmup, 0.0, 0, 2)], 8))


def test_a_step_that_raises_leaves_the_groups_own_lr_and_all_else():
    class Breaks(torch.optim.SGD):
        seen = None

        def step(self, closure=None):
            self.seen = [group["lr"] for group in self.param_groups]
            raise OSError("as it were")

    params = weights()
    lr = torch.tensor(0.1)
    base = Breaks([*params.values()], lr=lr)
    optimizer = sf_torch.ScheduleFreeWrapper(base, warmup_steps=4)
    optimizer.train()
    with pytest.raises(OSError, match="as it were"):
        take(optimizer, params, [0])
    assert base.seen == [pytest.approx(0.025)]
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.param_groups[0]["k"] == 0
    for name, p in weights().items():
        assert torch.equal(p, params[name])


def test_warmup_goes_on_where_it_was_after_a_pickle_and_a_load():
    params = weights()
    optimizer = over_sgd(params, warmup_steps=6)
    take(optimizer, params, range(3))
    again = pickle.loads(pickle.dumps(optimizer))
    copied = dict(zip(params, again.param_groups[0]["params"], strict=True))
    resumed = copy.deepcopy(params)
    loaded = over_sgd(resumed, warmup_steps=6)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its_params in ((optimizer, params), (again, copied), (loaded, resumed)):
        take(one, its_params, range(3, 9))
        warmup = reference.warmup(lambda k: 0.1, 6)
        right = reference_run([([*SHAPES], warmup, 0.0, 0, 2)], 9)
        assert_is(one, its_params, right)


def test_a_share_is_no_number_of_warmup_steps():
    with pytest.raises(TypeError, match=r"warmup_steps must be a whole number.*0\.1"):
        over_sgd(weights(), warmup_steps=0.1)


# r and weight_lr_power, which each group has


def test_each_group_weighs_by_its_own_powers():
    params = weights()
    groups = [
        {"params": [params["matrix"]], "r": 1.5, "weight_lr_power": 0.0},
        {"params": [params["bias"], params["other"]]},
    ]
    base = torch.optim.SGD(groups, lr=0.1)
    optimizer = sf_torch.ScheduleFreeWrapper(base, r=0.5, warmup_steps=5)
    optimizer.train()
    assert [g["r"] for g in optimizer.state_dict()["param_groups"]] == [1.5, 0.5]
    optimizer.param_groups[1]["weight_lr_power"] = 1.0
    take(optimizer, params, range(10))
    warmup = reference.warmup(lambda k: 0.1, 5)
    right = [(["matrix"], warmup, 0, 1.5, 0), (["bias", "other"], warmup, 0, 0.5, 1)]
    assert_is(optimizer, params, reference_run(right, 10))


def test_a_base_whose_options_have_these_names_is_refused():
    class Other(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "r": 3.0})

    base = Other([*weights().values()])
    with pytest.raises(ValueError, match="Other has options called r"):
        sf_torch.ScheduleFreeWrapper(base)
    assert "weight_lr_power" not in base.param_groups[0]


# A narrow state

B2 = 0.99
NARROW = {
    "adamw": lambda p, **o: sf_torch.ScheduleFreeWrapper(
        torch.optim.AdamW(p, lr=0.01, betas=(0.0, B2)), **o
    ),
    "reference": lambda p, **o: sf_torch.ScheduleFreeWrapperReference(
        torch.optim.RMSprop(p, lr=0.01, alpha=B2), **o
    ),
    "muon": lambda p, **o: sf_torch.MuonScheduleFree(p, betas=(0.9, B2), **o),
    "normuon": lambda p, **o: sf_torch.MuonScheduleFree(
        p, betas=(0.9, B2), row_b2=0.9, **o
    ),
    # With d that stays what it was, so that v is that of d * 1.
    "prodigy": lambda p, **o: sf_torch.ProdigyScheduleFree(
        p, betas=(0.9, B2), estim_lr0=1.0, lr=0.001, **o
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", NARROW.values(), ids=NARROW.keys())
def test_a_narrow_state_leaves_the_bases_moments_exact(build, dtype):
    params = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((4, 2), (4,))]
    optimizer = build(params, state_dtype=torch.bfloat16)
    optimizer.train()
    for _ in range(150):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    wide = torch.promote_types(dtype, torch.float32)
    for p in params:
        state = optimizer.state[p]
        for key, value in state.items():
            if key in ("x", "y", "z"):
                assert value.dtype == torch.bfloat16
            elif isinstance(value, torch.Tensor) and value.dim():
                assert value.dtype == wide, key
    v = optimizer.state[params[1]].get("exp_avg_sq")
    v = optimizer.state[params[1]]["square_avg"] if v is None else v
    # The running mean of ones: in bfloat16 it stalls far below.
    right = torch.full((4,), 1 - B2**150, dtype=wide)
    torch.testing.assert_close(v, right, rtol=1e-5, atol=0)


def test_a_narrow_state_is_a_rounding_of_the_wide_one():
    """Where z moves by much more than its rounding, so that nothing stalls."""
    wide, narrow = weights(torch.float32), weights(torch.float32)
    for params, dtype in ((wide, None), (narrow, torch.bfloat16)):
        optimizer = over_sgd(params, state_dtype=dtype, weight_decay_at_y=0.1)
        take(optimizer, params, range(6))
    for name in SHAPES:
        torch.testing.assert_close(narrow[name], wide[name], rtol=0, atol=0.03)


# The presets


def same(ours, theirs):
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(a, b)


def test_muon_is_the_wrapper_over_muon_and_adamw():
    ours, theirs = weights(), weights()
    optimizer = sf_torch.MuonScheduleFree(
        ours.values(), lr=0.05, weight_decay=0.1, adam_lr=0.02, momentum=0.8, r=1.0
    )
    muon = sf_torch.bases.Muon(
        [theirs["matrix"], theirs["other"]],
        lr=0.05,
        weight_decay=0.1,
        momentum=0.8,
        eps=1e-8,
        ns_dtype=None,
    )
    adamw = torch.optim.AdamW(
        [theirs["bias"]], lr=0.02, betas=(0.0, 0.999), weight_decay=0.1
    )
    by_hand = sf_torch.ScheduleFreeWrapper(
        sf_torch.CombinedOptimizer(muon, adamw), momentum=0.9, r=1.0
    )
    for each, params in ((optimizer, ours), (by_hand, theirs)):
        each.train()
        take(each, params, range(5))
    same(ours, theirs)


def test_groups_are_split_and_keep_their_options():
    params = weights()
    groups = [
        {"params": [("w", params["matrix"]), ("b", params["bias"])], "lr": 0.5},
        {"params": iter([("o", params["other"])]), "row_b2": 0.9, "weight_decay": 1.0},
    ]
    optimizer = sf_torch.MuonScheduleFree(groups, lr=0.1, adam_lr=0.25)
    asked = ("param_names", "lr", "row_b2", "weight_decay")
    assert [[g.get(key) for key in asked] for g in optimizer.param_groups] == [
        [["w"], 0.5, None, 0.0],
        [["o"], 0.1, 0.9, 1.0],
        [["b"], 0.25, None, 0.0],
    ]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.train()
    take(optimizer, params, [0])
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.05, 0.125]


@pytest.mark.parametrize("kind", [["matrix", "other"], ["bias"]])
def test_muon_takes_matrices_alone_and_others_alone(kind):
    params = {name: weights()[name] for name in kind}
    optimizer = sf_torch.MuonScheduleFree(params.values())
    optimizer.train()
    take(optimizer, params, range(2))
    assert not torch.equal(params[kind[0]], weights()[kind[0]])


def test_a_group_that_muon_gets_late_is_refused_and_a_late_gradient_is_not():
    params = weights()
    optimizer = sf_torch.MuonScheduleFree(params.values())
    before = [dict(group) for group in optimizer.param_groups]
    late = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="Give it all parameters"):
        optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups == before
    optimizer.train()
    for p in params.values():
        p.grad = torch.ones_like(p) if p.ndim == 2 else None
    optimizer.step()
    assert torch.equal(params["bias"], weights()["bias"])
    take(optimizer, params, [1])
    assert not torch.equal(params["bias"], weights()["bias"])


PRESETS = {
    "muon": lambda p: sf_torch.MuonScheduleFree(p, row_b2=0.9, warmup_steps=4),
    "prodigy": lambda p: sf_torch.ProdigyScheduleFree(p, warmup_steps=4),
}
presets = pytest.mark.parametrize("build", PRESETS.values(), ids=PRESETS.keys())


@presets
def test_a_run_goes_on_from_a_state_dict_and_a_pickle(build):
    params = weights()
    optimizer = build(params.values())
    optimizer.train()
    take(optimizer, params, range(3))
    resumed = copy.deepcopy(params)
    loaded = build(resumed.values())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again, pickled = pickle.loads(pickle.dumps((optimizer, params)))
    for one, its in ((optimizer, params), (loaded, resumed), (again, pickled)):
        take(one, its, range(3, 8))
    same(resumed, params)
    same(pickled, params)


@pytest.mark.parametrize("name", ["Muon", "Prodigy"])
def test_arguments_have_the_names_and_defaults_of_jax(name):
    ours = inspect.signature(getattr(sf_torch, f"{name}ScheduleFree")).parameters
    theirs = inspect.signature(
        getattr(sf_jax, f"schedule_free_{name.lower()}")
    ).parameters
    both = (ours.keys() & theirs.keys()) - {"warmup_steps", "ns_steps"}
    least = {"eps", "weight_decay", "r", "weight_lr_power", "store_x", "state_dtype"}
    assert both >= least
    assert {n: ours[n].default for n in both} == {n: theirs[n].default for n in both}
    assert ours["lr"].default == theirs["learning_rate"].default
    assert ours["betas"].default == (theirs["b1"].default, theirs["b2"].default)
    assert ours["warmup_steps"].default == 0  # which is None in JAX


def test_prodigy_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ImportError, match="pip install prodigyopt"):
        sf_torch.ProdigyScheduleFree(weights().values())


REFUSED = [
    (sf_torch.MuonScheduleFree, {"betas": (1.5, 0.9)}, ValueError, "1.5"),
    (sf_torch.MuonScheduleFree, {"momentum": 1.0}, ValueError, "momentum.*1.0"),
    (sf_torch.MuonScheduleFree, {"row_b2": -0.1}, ValueError, "row_b2.*-0.1"),
    (sf_torch.MuonScheduleFree, {"lr": -1.0}, ValueError, "lr.*-1.0"),
    (sf_torch.MuonScheduleFree, {"adam_lr": -1.0}, ValueError, "adam_lr.*-1.0"),
    (sf_torch.MuonScheduleFree, {"warmup_steps": 0.1}, TypeError, "0.1"),
    (sf_torch.ProdigyScheduleFree, {"betas": (0.9, 1.0)}, ValueError, "1.0"),
    (sf_torch.ProdigyScheduleFree, {"inner_momentum": 2}, ValueError, "momentum.*2"),
    (sf_torch.ProdigyScheduleFree, {"weight_decay": -1}, ValueError, "decay.*-1"),
    (sf_torch.ProdigyScheduleFree, {"beta3": 1.0}, ValueError, "beta3.*1.0"),
    (sf_torch.ProdigyScheduleFree, {"variant": "paper"}, ValueError, "variant"),
    (
        sf_torch.ProdigyScheduleFree,
        {"variant": "algoperf", "inner_momentum": 0.9},
        ValueError,
        "inner_momentum=0.9 have no place",
    ),
    (
        sf_torch.MuonScheduleFree,
        {"upstream_compatible": True},
        ValueError,
        "growing_b1",
    ),
    (
        sf_torch.MuonScheduleFree,
        {"upstream_compatible": True, "betas": (sf_torch.growing_b1(0.6, 9), 0.9)},
        ValueError,
        "warmup_steps=9",
    ),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED)
def test_what_an_argument_cannot_mean_is_refused(make, options, error, message):
    with pytest.raises(error, match=message):
        make(weights().values(), **options)


def test_a_beta_that_cannot_grow_is_refused():
    with pytest.raises(
        ValueError, match=r"steps must be a whole number in \[2, .*got 1"
    ):
        sf_torch.growing_b1(steps=1)


def test_prodigys_entry_weighs_by_the_number_of_the_step_alone():
    optimizer = sf_torch.ProdigyScheduleFree(weights().values(), variant="algoperf")
    group = optimizer.param_groups[0]
    assert (group["r"], group["weight_lr_power"]) == (0.75, 0.0)


def test_betas_of_a_group_and_one_tensor_are_refused():
    p = weights()["matrix"]
    with pytest.raises(ValueError, match=r"betas \(0\.5, 0\.9\) of its own"):
        sf_torch.MuonScheduleFree([{"params": [p], "betas": (0.5, 0.9)}])
    with pytest.raises(TypeError, match="params must be parameters or groups"):
        sf_torch.MuonScheduleFree(p)


@presets
def test_gradients_of_zero_leave_the_weights_where_they_are(build):
    params = weights(torch.float32)
    optimizer = build(params.values())
    optimizer.train()
    for _ in range(2):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    same(params, weights(torch.float32))


@pytest.mark.parametrize("key", ["exp_avg_sq", "exp_avg"])
def test_narrow_moments_of_a_base_from_before_are_widened(key):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = NARROW["adamw"]([p], state_dtype=torch.bfloat16)
    optimizer.train()
    for _ in range(2):
        state = optimizer.state[p]
        if key in state:
            state[key] = state[key].bfloat16()
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert state[key].dtype == torch.float32
