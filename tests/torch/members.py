"""Every optimizer of sf_torch with options that reach all parts of its step.

Tests that hold for all members are parametrised over :data:`MEMBERS`, and built and
stepped by what users call, so that they know nothing of how a step is made.
"""

from functools import partial

import torch

import sf_torch

SGD = {"lr": 0.5, "weight_decay": 0.1, "warmup_steps": 3}
ADAMW = {"lr": 0.02, "weight_decay": 0.5, "warmup_steps": 3}
MOMENTUM = {**ADAMW, "inner_momentum": 0.9}
RADAM = {"lr": 0.02, "weight_decay": 0.5, "silent_sgd_phase": False}
PLUS = {"lr": 0.5, "weight_decay": 1.0, "polyak_beta": 0.5, "c_warmup": 2}
AMUSE = {
    "betas": (sf_torch.growing_b1(0.6, 3, 0.8), 0.9),
    "upstream_compatible": True,
}
GPA = {"lr": 0.1, "weight_decay": 0.5}


def over(base, **base_options):
    """A wrapper's options, with a base that has these."""
    return {"base": partial(base, **base_options), "weight_decay_at_y": 0.5}


RMSPROP = over(torch.optim.RMSprop, lr=0.01, weight_decay=0.1)

MEMBERS = {
    name: (getattr(sf_torch, name.split("/")[0]), options)
    for name, options in {
        "SGDScheduleFree": SGD,
        "SGDScheduleFree/decay at z": {**SGD, "decay_at": "z"},
        "SGDScheduleFree/beta 0": {**SGD, "momentum": 0.0},
        "SGDScheduleFreeReference": {**SGD, "decay_at": "x"},
        "SGDScheduleFreeClosure": SGD,
        "SGDScheduleFreeRefined": {**SGD, "refined_c": 20.0},
        "AdamWScheduleFree": ADAMW,
        "AdamWScheduleFree/momentum": {**MOMENTUM, "decay_at": "z"},
        "AdamWScheduleFree/stored": {**MOMENTUM, "decay_at": "x", "store_x": True},
        "AdamWScheduleFreeReference": ADAMW,
        "AdamWScheduleFreeClosure": MOMENTUM,
        "AdamWScheduleFreeRefined": {**MOMENTUM, "refined_c": 20.0},
        "AdamWScheduleFreePaper": MOMENTUM,
        "AdamWScheduleFreeAlgoPerf": MOMENTUM,
        "AdamWScheduleFreeAlgoPerfV2": ADAMW,
        "RAdamScheduleFree": RADAM,
        "RAdamScheduleFreeReference": RADAM,
        "RAdamScheduleFreeClosure": RADAM,
        "RAdamScheduleFreeRefined": {**RADAM, "refined_c": 20.0},
        "AdamCScheduleFreePlus": {**PLUS, "sf_beta1_anneal_steps": 4},
        "AdamCScheduleFreePlusPaper": PLUS,
        "GPAAdamW": GPA,
        "GPAAdamW/upstream": {**GPA, "upstream_compatible": True},
        "GPAAdamW/upstream at y": {
            **GPA,
            "upstream_compatible": True,
            "decay_at": "y",
        },
        "GPAAdamW/upstream stored": {
            **GPA,
            "upstream_compatible": True,
            "store_x": True,
        },
        "MuonScheduleFree": ADAMW,
        "MuonScheduleFree/rows": {**ADAMW, "row_b2": 0.9},
        "MuonScheduleFree/amuse": {**ADAMW, **AMUSE},
        "ProdigyScheduleFree": {**ADAMW, "estim_lr0": 0.01},
        "ProdigyScheduleFree/algoperf": {
            **ADAMW,
            "estim_lr0": 0.01,
            "variant": "algoperf",
        },
        "ScheduleFreeWrapper": {**RMSPROP, "warmup_steps": 3},
        "ScheduleFreeWrapperReference": RMSPROP,
        "ScheduleFreeWrapperClosure": RMSPROP,
        "ScheduleFreeWrapperRefined": {**RMSPROP, "refined_c": 20.0},
    }.items()
}
# Their step is that of their base, and no kernel's.
OVER_A_BASE = {
    name
    for name, (make, _) in MEMBERS.items()
    if issubclass(make, sf_torch.ScheduleFreeWrapper)
}


def build(name, params, **more):
    """The member over these parameters (or groups), in the mode that it trains in."""
    make, options = MEMBERS[name]
    options = {**options, **more}
    base = options.pop("base", None)
    optimizer = make(params if base is None else base(params), **options)
    if "Closure" not in name:
        optimizer.train()
    return optimizer


def tensors(shapes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device) for s in shapes]


def parameters(shapes, device="cpu"):
    return [torch.nn.Parameter(t) for t in tensors(shapes, device=device)]


def set_gradients(params, k, in_place=False):
    """Those of step k: in fresh memory, or in that of the step before."""
    grads = tensors([p.shape for p in params], seed=100 + k, device=params[0].device)
    for p, grad in zip(params, grads, strict=True):
        if in_place and p.grad is not None:
            p.grad.copy_(grad)
        else:
            p.grad = grad.to(p.dtype)


def loss_of(k):
    return 1.0 + 0.1 * k


def run(optimizer, params, ks, take=None, in_place=False):
    """Takes the steps ks, through ``take`` in place of ``optimizer.step``."""
    for k in ks:
        set_gradients(params, k, in_place)
        (take or optimizer.step)(lambda k=k: loss_of(k))


def iterates(optimizer, params):
    """What the parameters hold, x and z."""
    held = [p.detach() for p in params]
    zs = [optimizer.state[p]["z"] for p in params]
    return {"parameter": held, "x": optimizer.eval_params(), "z": zs}


def assert_same_iterates(ours, theirs, tolerance):
    """Within ``tolerance`` of the largest entry, at least 1, of each tensor."""
    for name in theirs:
        for i, (a, b) in enumerate(zip(ours[name], theirs[name], strict=True)):
            scale = max(1.0, float(b.abs().max()))
            torch.testing.assert_close(
                a,
                b,
                rtol=0,
                atol=tolerance * scale,
                msg=lambda m, n=name, i=i: f"{n} of parameter {i}: {m}",
            )
