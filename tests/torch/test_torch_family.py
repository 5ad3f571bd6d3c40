"""What the members of the family promise beyond following other implementations."""

import copy
import math
from functools import partial

import pytest
import schedulefree
import torch

import sf_torch
from sf_torch.bases import Muon

STEPS = 30


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3, dtype=dtype)) for _ in range(2)]


def train(make, dtype=torch.float32, steps=STEPS, each_step=None):
    """x and z after each step, on a bowl whose slope is noisy."""
    params = parameters(dtype)
    optimizer = make(params)
    optimizer.train()
    noise = torch.Generator().manual_seed(1)
    seen = []
    for k in range(steps):
        loss = torch.tensor(5.0)
        for p in params:
            p.grad = 2 * p.detach() + 0.3 * torch.randn(5, 3, generator=noise).to(dtype)
            loss += p.detach().square().sum()
        if each_step:
            each_step(optimizer, k)
        optimizer.step(lambda loss=loss: loss)
        zs = [optimizer.state[p]["z"] for p in params]
        seen.append(torch.cat(optimizer.eval_params(zs[0].dtype) + zs).clone())
    return torch.stack(seen)


close = partial(torch.testing.assert_close, rtol=2e-6, atol=2e-6)
PLAIN = {
    "SGDScheduleFree": {"lr": 0.1},
    "AdamWScheduleFree": {"lr": 0.02, "weight_decay": 0.1, "r": 0.5},
    "RAdamScheduleFree": {"lr": 0.02},
}


# One optimizer, two ways


@pytest.mark.parametrize("name", PLAIN)
def test_refined_with_c_of_one_over_one_minus_beta_is_plain(name):
    refined = partial(getattr(sf_torch, f"{name}Refined"), refined_c=1 / (1 - 0.9))
    close(
        train(partial(refined, **PLAIN[name])),
        train(partial(getattr(sf_torch, name), **PLAIN[name])),
    )


def test_refined_wrapper_is_the_refined_optimizer():
    close(
        train(
            lambda p: sf_torch.ScheduleFreeWrapperRefined(
                torch.optim.SGD(p, lr=0.1), refined_c=40.0
            )
        ),
        train(partial(sf_torch.SGDScheduleFreeRefined, lr=0.1, refined_c=40.0)),
    )


def test_gpa_with_the_coefficients_of_schedule_free_is_schedule_free():
    def mean(optimizer, k):
        optimizer.param_groups[0]["mu_x"] = 1 - 1 / (k + 1)

    options = {"lr": 0.02, "weight_decay": 0.1, "decay_at": "z"}
    gpa = partial(sf_torch.GPAAdamW, mu_y=0.9, betas=(0.9, 0.99), **options)
    plain = partial(
        sf_torch.AdamWScheduleFree, betas=(0.9, 0.99), inner_momentum=0.9, **options
    )
    close(train(gpa, each_step=mean), train(plain))


@pytest.mark.parametrize("decay_at", ["z", "y"])
def test_gpa_upstream_is_one_whether_x_is_stored_or_not(decay_at):
    make = partial(sf_torch.GPAAdamW, lr=0.02, weight_decay=0.5, decay_at=decay_at)
    lean = train(partial(make, upstream_compatible=True))
    close(lean, train(partial(make, upstream_compatible=True, store_x=True)))
    assert not torch.allclose(lean, train(make), rtol=1e-3)


# ScheduleFree+


def step_sizes(**options):
    """At constant loss and gradient z moves by the step size, in each coordinate."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = sf_torch.AdamCScheduleFreePlus([p], sf_beta1=0.0, **options)
    optimizer.train()
    z = [0.0]
    for _ in range(21):
        p.grad = torch.full((3,), 0.2)
        optimizer.step_func(function_value=0.7)
        z.append(float(optimizer.state[p]["z"][0]))
    moved = torch.diff(torch.tensor(z))
    return moved / moved[0]


def test_upstreams_mean_makes_the_step_size_vanish():
    sizes = step_sizes(polyak_beta=0.9, upstream_compatible=True)
    assert f"{sizes[20]:.1e}" == "2.5e-04"


@pytest.mark.parametrize("polyak_beta", [0.0, 0.9])
def test_ours_stays(polyak_beta):
    torch.testing.assert_close(
        step_sizes(polyak_beta=polyak_beta), torch.ones(21), rtol=1e-5, atol=0
    )


PLUS = {"weight_decay": 1.0, "polyak_beta": 0.9, "sf_beta1_anneal_steps": 20}


def test_plus_stores_as_much_as_adamw_and_paper_stores_all():
    for name, keys in {
        "AdamCScheduleFreePlus": {"z", "exp_avg", "exp_avg_sq"},
        "AdamCScheduleFreePlusPaper": {"x", "y", "z", "exp_avg", "exp_avg_sq"},
    }.items():
        (p, _), optimizer = parameters(), None
        optimizer = getattr(sf_torch, name)([p])
        optimizer.train()
        p.grad = torch.ones_like(p)
        optimizer.step_func(function_value=1.0)
        assert optimizer.state[p].keys() == keys | {"missed"}


def test_plus_and_paper_agree():
    fast = train(partial(sf_torch.AdamCScheduleFreePlus, **PLUS), torch.float64)
    paper = train(partial(sf_torch.AdamCScheduleFreePlusPaper, **PLUS), torch.float64)
    torch.testing.assert_close(fast, paper, rtol=1e-11, atol=1e-11)


def test_plus_sums_over_all_groups():
    def grouped(params):
        return sf_torch.AdamCScheduleFreePlus([{"params": [p]} for p in params], **PLUS)

    close(train(grouped), train(partial(sf_torch.AdamCScheduleFreePlus, **PLUS)))


def test_plus_goes_on_from_its_state_dict():
    make = partial(sf_torch.AdamCScheduleFreePlus, **PLUS)

    def reload(optimizer, k):
        if k == STEPS // 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.__init__(optimizer.param_groups[0]["params"], **PLUS)
            optimizer.load_state_dict(saved)

    torch.testing.assert_close(
        train(make, each_step=reload), train(make), rtol=0, atol=0
    )


def test_plus_cannot_be_captured():
    (p, _) = parameters()
    with pytest.raises(ValueError, match="found on the host"):
        sf_torch.AdamCScheduleFreePlus([{"params": [p], "capturable": True}])


def test_plus_steps_where_a_compiler_has_turned_capturable_on():
    (p, _) = parameters()
    optimizer = sf_torch.AdamCScheduleFreePlus([p])
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["capturable"] = True  # as torch.compile does for GPUs
    optimizer.step_func(function_value=1.0)
    group = optimizer.param_groups[0]
    assert (group["k"], group["capturable"]) == (1, False)


def test_plus_without_the_loss_changes_nothing():
    (p, _) = parameters()
    before = p.detach().clone()
    optimizer = sf_torch.AdamCScheduleFreePlus([p])
    optimizer.train()
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="function_value=loss"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.param_groups[0]["k"] == 0


def test_plus_without_gradients_moves_nothing():
    (p, _) = parameters()
    before = p.detach().clone()
    optimizer = sf_torch.AdamCScheduleFreePlus([p], weight_decay=1.0)
    optimizer.train()
    p.grad = torch.zeros_like(p)
    optimizer.step_func(function_value=1.0)
    assert torch.equal(p, before)


def test_plus_keeps_its_floor_in_copies_and_a_number_in_state_dicts():
    (p, other) = parameters()
    optimizer = sf_torch.AdamCScheduleFreePlus([p], loss_floor=lambda k: 1.0 + k)
    optimizer.train()
    optimizer = copy.deepcopy(optimizer)
    (p,) = optimizer.param_groups[0]["params"]
    sizes = []
    for value in (1.5, 1.5, 9.5):
        p.grad = torch.ones_like(p)
        optimizer.step_func(function_value=value)
        sizes.append(optimizer.param_groups[0]["scheduled_lr"])
        if len(sizes) == 2:  # while the schedule's value is not the first one
            optimizer.add_param_group({"params": [other]})
    assert sizes[0] > 0 == sizes[1] < sizes[2]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["loss_floor"] == 3.0
    resumed = sf_torch.AdamCScheduleFreePlus([{"params": [q]} for q in (p, other)])
    resumed.load_state_dict(saved)
    assert resumed.param_groups[1]["loss_floor"] == 3.0
    p.grad = torch.ones_like(p)
    for value, moves in ((2.9, False), (9.5, True)):
        resumed.step_func(function_value=value)
        assert (resumed.param_groups[0]["scheduled_lr"] > 0) == moves


# What Prodigy needs of the wrapper


class Growing(torch.optim.SGD):
    """Finds a larger d at each step, and puts it on the next: 1, 2, 5, 26."""

    def step(self, closure=None):
        for group in self.param_groups:
            d = group.setdefault("d", 1.0)
            group["lr"], lr = group["lr"] * d, group["lr"]
            super().step(closure)
            group["lr"], group["d"] = lr, d**2 + 1


def test_the_wrapper_weighs_by_d_as_metas_does():
    def make(package, decay, params):
        base = Growing(params, lr=1e-3)
        wrapper = package.ScheduleFreeWrapper(
            base, momentum=0.9, weight_decay_at_y=decay
        )
        wrapper.train()
        return wrapper

    for decay in (0.0, 0.1):
        ours, theirs = parameters(), parameters()
        a, b = make(sf_torch, decay, ours), make(schedulefree, decay, theirs)
        for _ in range(4):
            for p in (*ours, *theirs):
                p.grad = torch.cos(p.detach())
            a.step()
            b.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q)
            close(a.state[p]["z"], b.state[q]["z"])


# Muon and AdamW in one


def muon_and_adamw(params, muon=torch.optim.Muon):
    matrix, rest = params
    return (
        muon([matrix], lr=0.02),
        torch.optim.AdamW([rest], lr=0.01, betas=(0.0, 0.99)),
    )


@pytest.mark.parametrize(
    "muon",
    [
        torch.optim.Muon,
        partial(Muon, ns_dtype=torch.float32, row_b2=0.9),
    ],
    ids=["torch's", "NorMuon"],
)
def test_together_is_each_by_itself_and_goes_on_from_its_state_dict(muon):
    ours, apart = parameters(), parameters()
    base = sf_torch.CombinedOptimizer(*muon_and_adamw(ours, muon))
    joint = sf_torch.ScheduleFreeWrapper(base)
    two = [sf_torch.ScheduleFreeWrapper(base) for base in muon_and_adamw(apart, muon)]
    for optimizer in (joint, *two):
        optimizer.train()
    for k in range(8):
        if k == 4:
            saved = copy.deepcopy(joint.state_dict())
            base = sf_torch.CombinedOptimizer(*muon_and_adamw(ours, muon))
            joint = sf_torch.ScheduleFreeWrapper(base)
            joint.load_state_dict(saved)
        for p, q in zip(ours, apart, strict=True):
            p.grad = torch.cos(p.detach() + k)
            q.grad = p.grad.clone()
        for optimizer in (joint, *two):
            optimizer.step()
    xs = [x for optimizer in two for x in optimizer.eval_params()]
    torch.testing.assert_close(joint.eval_params(), xs, rtol=0, atol=0)
    torch.testing.assert_close(ours, apart, rtol=0, atol=0)


def test_together_takes_no_group_of_unknown_owner():
    base = sf_torch.CombinedOptimizer(*muon_and_adamw(parameters()))
    with pytest.raises(ValueError, match="could belong to any"):
        base.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}], ids=str
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 3), (3, 8)], ids=str)
def test_muon_is_torchs_and_loads_its_state_dict(shape, weight_decay, options):
    torch.manual_seed(0)
    options = {"lr": 0.02, "weight_decay": weight_decay, **options}
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    a, b = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for k in range(30):
        if k == 15:
            a = Muon([ours], lr=1.0)
            a.load_state_dict(copy.deepcopy(b.state_dict()))
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    # Its decay rounds otherwise, once a step.
    bound = 30 * 2.0**-23 if weight_decay else 0
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_the_decay_of_muon_does_not_drift():
    """A factor of 1 - lr λ would be off by 250 ulps, always to the same side."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([p], lr=0.0025, weight_decay=0.1)
    for _ in range(1000):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    expected = torch.full_like(p, (1 - 0.0025 * 0.1) ** 1000)
    torch.testing.assert_close(p.detach(), expected, rtol=40 * 2.0**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_make_all_outputs_move_alike_by_the_step_of_adamw(dtype):
    """At the first step; without them the rows of a tall matrix move unequally."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(16, 5, dtype=dtype))
    optimizer = Muon([p], lr=0.5, row_b2=0.95, eps=1e-12, ns_dtype=None)
    p.grad = torch.randn(16, 5).to(dtype)
    optimizer.step()
    by_row = p.detach().square().mean(1).sqrt()
    size = torch.full_like(by_row, 0.5 * 0.2)
    torch.testing.assert_close(by_row, size, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("row_b2", [None, 0.95])
@pytest.mark.parametrize("shape", [(3, 2), (3, 0), (0, 2)], ids=str)
def test_muon_moves_nothing_without_gradients(shape, row_b2):
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = Muon([p], weight_decay=0.0, row_b2=row_b2)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(shape))
    assert all(moment.isfinite().all() for moment in optimizer.state[p].values())


BAD_ARGUMENTS = [
    (
        "AdamCScheduleFreePlus",
        {"betas": (1.0, 0.9)},
        r"betas must be a pair: .*got \(1.0, 0.9\)",
    ),
    ("AdamCScheduleFreePlus", {"sf_beta1": 1.5}, "sf_beta1.*got 1.5"),
    ("AdamCScheduleFreePlus", {"sf_beta1_max": 1.0}, "sf_beta1_max.*got 1.0"),
    ("AdamCScheduleFreePlus", {"polyak_beta": 1.0}, "polyak_beta.*got 1.0"),
    ("AdamCScheduleFreePlus", {"c_warmup": -1}, "c_warmup.*got -1"),
    ("AdamCScheduleFreePlus", {"loss_floor": math.inf}, "loss_floor.*got inf"),
    ("GPAAdamW", {"mu_y": 1.1}, "mu_y.*got 1.1"),
    ("GPAAdamW", {"mu_x": -0.1}, "mu_x.*got -0.1"),
    ("GPAAdamW", {"decay_at": "x", "upstream_compatible": True}, "got 'x'"),
    ("SGDScheduleFreeRefined", {"refined_c": -1.0}, "refined_c.*got -1.0"),
    ("Muon", {"momentum": 1.0}, "momentum.*got 1.0"),
    ("Muon", {"row_b2": 1.0}, "row_b2.*got 1.0"),
    ("Muon", {"weight_decay": -1.0}, "weight_decay.*got -1.0"),
    ("Muon", {"ns_coefficients": (1.0,)}, r"ns_coefficients.*got \(1.0,\)"),
    ("Muon", {"ns_dtype": torch.int8}, "ns_dtype.*got torch.int8"),
    ("Muon", {"adjust_lr_fn": "none"}, "adjust_lr_fn.*got 'none'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        {**vars(sf_torch), "Muon": Muon}[name](parameters(), **options)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)], ids=str)
def test_muon_takes_matrices_only_and_stays_as_it_was(shape):
    optimizer = Muon(parameters())
    with pytest.raises(ValueError, match=r"Give the others to AdamW"):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(shape))})
    assert len(optimizer.param_groups) == 1
