"""States go to Meta's ``schedulefree`` and back, mid-run, and go on as if they hadn't.

The released package is run beside ours. What its newest commit has besides stands
here as data: 70785b5 of facebookresearch/schedule_free.
"""

import copy
import io
from functools import partial

import pytest
import schedulefree
import torch

import sf_torch

COMMON = "lr r k weight_sum lr_max scheduled_lr weight_decay"
SHAPE = (3, 2)
# What each class of the newest commit reads from its groups.
NEWEST_KEYS = {
    "SGDScheduleFree": "momentum warmup_steps weight_lr_power train_mode foreach",
    "SGDScheduleFreeReference": "momentum warmup_steps weight_lr_power train_mode",
    "SGDScheduleFreeClosure": "momentum warmup_steps weight_lr_power foreach",
    "AdamWScheduleFree": "betas eps warmup_steps weight_lr_power train_mode foreach "
    "inner_momentum",
    "AdamWScheduleFreeReference": "betas eps warmup_steps weight_lr_power train_mode "
    "inner_momentum decay_at_z",
    "AdamWScheduleFreeClosure": "betas eps warmup_steps weight_lr_power foreach",
    "AdamWScheduleFreePaper": "betas eps warmup_steps weight_lr_power train_mode "
    "foreach",
    "RAdamScheduleFree": "betas eps weight_lr_power train_mode foreach "
    "silent_sgd_phase",
    "RAdamScheduleFreeClosure": "betas eps weight_lr_power foreach silent_sgd_phase",
    "AdamCScheduleFreePlusPaper": "betas sf_beta1 eps train_mode polyak_beta c_warmup "
    "sf_beta1_anneal_steps sf_beta1_max grad_l1_ema polyak_denom_ema weight_lr_power "
    "grad_l1_ema_corr function_value_ema ip_term",
}
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "r": 0.5}
EXTRA = {"RAdam": {"silent_sgd_phase": False}}


def over_sgd(package, name, params, **options):
    base = torch.optim.SGD(params, lr=0.05)
    return getattr(package, name)(base, weight_decay_at_y=0.1, **options)


def builders(name):
    """Ours and that of the released package."""
    extra = next((e for family, e in EXTRA.items() if name.startswith(family)), {})
    if "Wrapper" in name:
        return [
            partial(over_sgd, package, name) for package in (sf_torch, schedulefree)
        ]
    return [
        partial(getattr(package, name), **OPTIONS, **extra)
        for package in (sf_torch, schedulefree)
    ]


RELEASED = [n for n in [*NEWEST_KEYS, "ScheduleFreeWrapper"] if "Plus" not in n]
RELEASED.append("ScheduleFreeWrapperReference")


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(SHAPE, generator=generator))]


def in_train_mode(optimizer):
    if not type(optimizer).__name__.endswith("Closure"):
        optimizer.train()
    return optimizer


def step(optimizer, params, k):
    def closure():
        generator = torch.Generator().manual_seed(k)
        for p in params:
            p.grad = torch.randn(SHAPE, generator=generator)
        return 1.0

    if hasattr(optimizer, "step_func"):
        optimizer.step_func(function_value=closure())
    else:
        optimizer.step(closure)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(first, second, steps=10, at=5):
    """Parameters after ``steps``, the ones from ``at`` on by the second optimizer."""
    params = start()
    optimizer = in_train_mode(first(params))
    for k in range(steps):
        if k == at:
            saved = through_a_file(optimizer.state_dict())
            optimizer = in_train_mode(second(params))
            optimizer.load_state_dict(saved)
        step(optimizer, params, k)
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", RELEASED)
def test_a_run_goes_on_in_the_other_package(name, capsys):
    ours, theirs = builders(name)
    whole = run(theirs, theirs)
    for first, second in ((ours, theirs), (theirs, ours)):
        for a, b in zip(run(first, second), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", NEWEST_KEYS)
def test_groups_hold_what_the_newest_commit_asks_for(name):
    params = start()
    optimizer = in_train_mode(getattr(sf_torch, name)(params))
    step(optimizer, params, 0)
    keys = {*COMMON.split(), *NEWEST_KEYS[name].split()}
    assert keys <= optimizer.state_dict()["param_groups"][0].keys()


# Decay


@pytest.mark.parametrize("at_z", [True, False])
def test_the_group_of_a_reference_says_where_it_decays(at_z, capsys):
    """With lr = 0.1, λ = 1 and no gradient but 0, z' = z - 0.1 p."""
    build = partial(sf_torch.AdamWScheduleFreeReference, lr=0.1, weight_decay=1.0)
    other = partial(schedulefree.AdamWScheduleFreeReference, lr=0.1, weight_decay=1.0)
    params = start()
    theirs = other(params, decay_at_z=at_z)
    theirs.train()
    for k in range(4):
        step(theirs, params, k)
    # Into one that was built to decay elsewhere.
    ours = build(params, decay_at_z=not at_z)
    ours.train()
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    z, y = ours.state[params[0]]["z"].clone(), params[0].detach().clone()
    params[0].grad = torch.zeros(SHAPE)
    ours.step()
    right = z - 0.1 * (z if at_z else y)
    torch.testing.assert_close(ours.state[params[0]]["z"], right, rtol=1e-6, atol=1e-7)
    assert ours.state_dict()["param_groups"][0]["decay_at_z"] is at_z
    back = other(params)
    back.load_state_dict(through_a_file(ours.state_dict()))
    assert back.param_groups[0]["decay_at_z"] is at_z


@pytest.mark.parametrize("at", ["y", "z"])
def test_a_reference_has_the_key_after_the_state_of_the_plain_class(at):
    params = start()
    plain = in_train_mode(sf_torch.AdamWScheduleFree(params, decay_at=at))
    step(plain, params, 0)
    reference = sf_torch.AdamWScheduleFreeReference(params, decay_at_z=at != "z")
    reference.load_state_dict(plain.state_dict())
    assert reference.param_groups[0]["decay_at_z"] is (at == "z")


@pytest.mark.parametrize(
    "name", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"]
)
def test_the_decay_of_a_wrapper_is_read_from_its_groups(name):
    params = start()
    base = torch.optim.SGD(params, lr=0.1)
    optimizer = getattr(sf_torch, name)(base)
    optimizer.train()
    optimizer.param_groups[0]["weight_decay_at_y"] = 0.5
    before = params[0].detach().clone()  # x, y and z
    params[0].grad = torch.zeros(SHAPE)
    optimizer.step()
    z = optimizer.state[params[0]]["z"]
    torch.testing.assert_close(z, before * (1 - 0.1 * 0.5), rtol=1e-6, atol=1e-7)
    assert optimizer.state_dict()["param_groups"][0]["weight_decay_at_y"] == 0.5


# ScheduleFree+


def test_plus_logs_what_the_newest_commit_logs():
    """At the first step z = x, so that I = 0 and lr_k = f / (sqrt(π/2) Σ|g|)."""
    params = start()
    optimizer = sf_torch.AdamCScheduleFreePlusPaper(params)
    optimizer.train()
    params[0].grad = torch.full(SHAPE, 0.5)
    assert optimizer.step_func(function_value=3.0) == 3.0
    group = optimizer.param_groups[0]
    size = (torch.pi / 2) ** 0.5 * 6 * 0.5
    assert group["ip_term"] == 0
    assert group["function_value_ema"] == 3.0
    assert group["grad_l1_ema_corr"] == pytest.approx(size)
    assert group["scheduled_lr"] == pytest.approx(3.0 / size)


# What is called the same way


def test_modes_begin_as_in_the_published_package():
    for name in NEWEST_KEYS:
        if hasattr(schedulefree, name) and not name.endswith("Closure"):
            ours, theirs = (
                getattr(package, name)(start()).param_groups[0]["train_mode"]
                for package in (sf_torch, schedulefree)
            )
            assert ours is theirs, name


def test_a_step_outside_train_mode_speaks_of_train_mode():
    optimizer = sf_torch.AdamWScheduleFree(start())
    with pytest.raises(RuntimeError, match="train mode"):
        optimizer.step()


POSITIONAL = {  # what comes after weight_lr_power in the newest commit
    "AdamWScheduleFree": (0.8, False),
    "AdamWScheduleFreeReference": (True, 0.8, False),
    "AdamWScheduleFreeClosure": (False,),
    "AdamWScheduleFreePaper": (False,),
    "RAdamScheduleFree": (False, False),
    "SGDScheduleFree": (False,),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_arguments_have_the_order_of_the_newest_commit(name):
    common = (
        (0.1, (0.9, 0.99), 1e-8, 0.0, 3, 0.5, 1.0)
        if name.startswith("AdamW")
        else (0.1, 0.9, 0.0, 3, 0.5, 1.0)
        if name.startswith("SGD")
        else (0.1, (0.9, 0.99), 1e-8, 0.0, 0.5, 1.0)
    )
    rest = POSITIONAL[name]
    group = getattr(sf_torch, name)(start(), *common, *rest).param_groups[0]
    assert group["weight_lr_power"] == 1.0
    assert group["foreach"] is False
    assert group.get("inner_momentum", 0.0) == (0.8 if 0.8 in rest else 0.0)
    assert group.get("decay_at", "y") == ("z" if True in rest else "y")


@pytest.mark.parametrize(
    "name",
    ["foreach", "fused", "capturable", "store_x", "upstream_compatible"],
)
def test_a_number_where_a_bool_belongs_is_refused(name):
    with pytest.raises(TypeError, match=rf"{name} must be .*True or False, got 0\.9"):
        sf_torch.AdamWScheduleFree(start(), **{name: 0.9})


# GPA


def test_the_state_of_the_published_gpa_is_refused():
    """It counts its steps in the state of the first parameter."""
    params = start()
    saved = {
        "state": {
            0: {
                "train_mode": torch.tensor(True),
                "lr_max": torch.tensor(0.1),
                "weight_sum": torch.tensor(0.0),
                "step": torch.tensor(7),
                **{key: torch.ones(SHAPE) for key in ("z", "exp_avg", "exp_avg_sq")},
            }
        },
        "param_groups": [
            {
                "lr": 0.1,
                "eps": 1e-8,
                "train_interp_coeff": 0.7,
                "beta1": 0.9,
                "beta2": 0.999,
                "weight_pow_coeff": 0.0,
                "weight_lr_power": 2,
                "weight_decay": 0.0,
                "use_wd_on_y": False,
                "eval_interp_coeff": 0.9967,
                "params": [0],
            }
        ],
    }
    optimizer = sf_torch.GPAAdamW(params)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group 0 has no k, weight_sum, lr_max, betas"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before
