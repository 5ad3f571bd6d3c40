"""What a constructor refuses a load refuses, by name and before anything changes."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from members import MEMBERS, OVER_A_BASE, build, parameters, run
from torch_cases import identical

import sf_torch

SHAPES = [(3, 2), (4,)]
NAN, INF = float("nan"), float("inf")


def in_group(**entries):
    def change(saved):
        for key, value in entries.items():
            if value is None:
                del saved["param_groups"][0][key]
            else:
                saved["param_groups"][0][key] = value

    return change


def in_state(**entries):
    def change(saved):
        for key, value in entries.items():
            if value == "gone":
                del saved["state"][1][key]
            else:
                saved["state"][1][key] = value

    return change


def replace(key, value):
    def change(saved):
        saved[key] = value

    return change


def renumbered(saved):
    saved["state"][7] = saved["state"].pop(1)


def twice(saved):
    saved["param_groups"][0]["params"] = [0, 0]


def less(saved):
    saved["param_groups"][0]["params"] = [0]


ANY = {  # of every optimizer
    "k=-5": (in_group(k=-5), "k must be a whole number from 0, got -5"),
    "k=2.5": (in_group(k=2.5), "k must be a whole number from 0, got 2.5"),
    "k=text": (in_group(k="7"), "k must be a whole number from 0, got '7'"),
    "k=True": (in_group(k=True), "k must be a whole number from 0, got True"),
    "no k": (in_group(k=None), "group 0 has no k"),
    "weight_sum": (in_group(weight_sum=NAN), "weight_sum must be a finite"),
    "negative sum": (in_group(weight_sum=-1.0), "weight_sum must be a finite"),
    "no sum": (in_group(weight_sum=None), "group 0 has no weight_sum"),
    "lr_max": (in_group(lr_max=NAN), "lr_max must be a finite"),
    "scheduled_lr": (in_group(scheduled_lr=INF), "scheduled_lr must be a finite"),
    "b1": (in_group(b1=2.0), "b1 must be a finite number from 0"),
    "train_mode": (in_group(train_mode="yes"), "train_mode must be True or False"),
    "lr": (in_group(lr=NAN), r"lr must be a number in \[0, 1e30\].*got nan"),
    "no lr": (in_group(lr=None), "group 0 has no lr"),
    "z=None": (in_state(z=None), "z must be a tensor, got None"),
    "complex z": (in_state(z=torch.zeros(4) * 1j), "z is torch.complex64"),
    "z's shape": (in_state(z=torch.zeros(1)), r"z \(1,\) for \(4,\)"),
    "no groups": (replace("param_groups", None), "no optimizer's state dict"),
    "no state": (replace("state", [1]), "no optimizer's state dict"),
    "states": (replace("state", {0: 1.0}), "a mapping for its state"),
    "another's number": (renumbered, r"state has \[0, 7\]"),
    "one number twice": (twice, r"groups are \[0, 0\]"),
    "fewer parameters": (less, r"groups of \[1\] parameters, the optimizer of \[2\]"),
}
ADAMW = {  # options and moments of one's own
    "betas": (
        in_group(betas=(2, 0.9)),
        r"betas must be a pair: a number in \[0, 1\].*got \(2, 0\.9\)",
    ),
    "no betas": (in_group(betas=None), "group 0 has no betas"),
    "eps": (in_group(eps=-1.0), r"eps must be a number in \[0, .*got -1\.0"),
    "decay_at": (in_group(decay_at="w"), "decay_at must be one of"),
    "state_dtype": (
        in_group(state_dtype="half"),
        "state_dtype must be None or a floating dtype.*got 'half'",
    ),
    "no moment": (in_state(exp_avg_sq="gone"), "has no exp_avg_sq, which AdamW"),
    "real moment": (in_state(exp_avg_sq=torch.zeros(4) * 1j), "exp_avg_sq is torch.c"),
    "left over": (in_state(buffer=torch.ones(4)), "has buffer, which AdamW"),
    "missed": (in_state(missed=99), "missed must be a whole number from 0, got 99"),
}
CASES = [("AdamWScheduleFree", *case) for case in (ANY | ADAMW).values()]
CASES += [("ScheduleFreeWrapper", *case) for case in ANY.values()]
CASES += [
    ("AdamCScheduleFreePlus", in_group(grad_l1_ema=INF), "grad_l1_ema must be a fin"),
    ("GPAAdamW", in_group(mu_x=1.5), r"mu_x must be a number in \[0, 1\], got 1\.5"),
    (
        "SGDScheduleFreeRefined",
        in_group(refined_c=-1.0),
        r"refined_c must be a number in \[0, .*got -1\.0",
    ),
    ("SGDScheduleFree/beta 0", in_state(x="gone"), "has no x, which SGD"),
    ("ScheduleFreeWrapper", in_group(alpha=None), "group 0 has no alpha"),
    ("ScheduleFreeWrapper", in_group(weight_decay_at_y=-1.0), "weight_decay_at_y must"),
]


def trained(name, steps=2):
    params = parameters(SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, range(steps))
    return params, optimizer


def everything(params, optimizer):
    return copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()])


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_a_state_that_no_optimizer_could_have_is_refused(name, change, message):
    params, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert identical(everything(params, optimizer), before)


def test_all_that_is_wrong_stands_in_one_message():
    _, optimizer = trained("AdamWScheduleFree")
    saved = copy.deepcopy(optimizer.state_dict())
    in_group(k=-1, lr=NAN, weight_sum=NAN)(saved)
    with pytest.raises(ValueError, match=r"(?s)lr .*nan.*k .*-1.*weight_sum .*nan"):
        optimizer.load_state_dict(saved)


def test_groups_in_different_modes_are_refused():
    params = parameters(SHAPES)
    optimizer = sf_torch.SGDScheduleFree([{"params": [p]} for p in params])
    saved = copy.deepcopy(optimizer.state_dict())
    in_group(train_mode=True)(saved)
    with pytest.raises(ValueError, match="others in eval mode"):
        optimizer.load_state_dict(saved)


# Of other options or moments. Whether AdamW has a first moment is no difference: its
# groups say so, and are loaded too.
KINDS = ("SGDScheduleFree", "AdamWScheduleFree", "GPAAdamW", "ScheduleFreeWrapper")


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(KINDS, 2)])
def test_the_state_of_another_kind_of_optimizer_is_refused(first, second):
    params, optimizer = trained(second)
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=r"has no |does not keep"):
        optimizer.load_state_dict(trained(first)[1].state_dict())
    assert identical(everything(params, optimizer), before)


@pytest.mark.parametrize("name", MEMBERS)
def test_what_every_optimizer_saves_it_loads(name):
    params, optimizer = trained(name)
    file = io.BytesIO()
    torch.save([params, optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, other = trained(name, steps=1)
    with torch.no_grad():
        for p, value in zip(others, saved[0], strict=True):
            p.copy_(value)
    other.load_state_dict(saved[1])
    for each, its in ((optimizer, params), (other, others)):
        run(each, its, [2])
    assert identical(everything(others, other), everything(params, optimizer))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_numbers_of_numpy_are_saved_as_python_s(name):
    params = parameters(SHAPES)
    lr = np.float32(0.1)
    if name in OVER_A_BASE:
        optimizer = sf_torch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=lr))
    else:
        betas = (np.float64(0.9), np.float32(0.99))
        optimizer = sf_torch.AdamWScheduleFree(params, lr=lr, betas=betas)
        assert type(optimizer.param_groups[0]["betas"][1]) is float
    assert type(optimizer.param_groups[0]["lr"]) is float
    optimizer.param_groups[0]["lr"] = np.float64(0.25)  # as a scheduler may set it
    optimizer.train()
    run(optimizer, params, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["lr"] == 0.25
