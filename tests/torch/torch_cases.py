"""Models, gradients and optimizers that the tests of sf_torch share."""

import functools

import pytest
import torch

import sf_torch


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
    )


def trained(build, model, steps=4):
    optimizer = build(model.parameters())
    optimizer.train()
    for seed in range(steps):
        gradients(model, seed)
        optimizer.step()
    return optimizer


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def wrapped(params, **options):
    return sf_torch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1), **options)


FORMS = {
    "sgd": lambda params: sf_torch.SGDScheduleFree(params, lr=0.1),
    "stored": lambda params: sf_torch.AdamWScheduleFree(params, lr=0.1, store_x=True),
    "b1=0": lambda params: sf_torch.SGDScheduleFree(params, lr=0.1, momentum=0.0),
    "reference": lambda params: sf_torch.RAdamScheduleFreeReference(
        params, lr=0.1, silent_sgd_phase=False
    ),
    "wrapper": wrapped,
}
forms = pytest.mark.parametrize("build", FORMS.values(), ids=FORMS.keys())


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def identical(a, b):
    """Whether two state dicts hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


# RAdam's first steps move nothing unless told otherwise.
EXTRA = {"RAdam": {"silent_sgd_phase": False}}
NAMED = {
    f"{family}ScheduleFree{form}": functools.partial(
        getattr(sf_torch, f"{family}ScheduleFree{form}"), **EXTRA.get(family, {})
    )
    for family in ("SGD", "AdamW", "RAdam")
    for form in ("", "Reference", "Closure")
} | {"AdamWScheduleFreePaper": sf_torch.AdamWScheduleFreePaper}


def over_adam(wrapper, params, **options):
    return wrapper(torch.optim.Adam(params, betas=(0.0, 0.99), **options))


WRAPPERS = {
    name: functools.partial(over_adam, getattr(sf_torch, name))
    for name in (
        "ScheduleFreeWrapper",
        "ScheduleFreeWrapperReference",
        "ScheduleFreeWrapperClosure",
    )
}
ALL = NAMED | WRAPPERS
every = pytest.mark.parametrize("build", ALL.values(), ids=ALL.keys())


def step(model, optimizer, seed):
    gradients(model, seed)
    optimizer.step(lambda: gradients(model, seed))


def started(build, model, steps=0, **options):
    optimizer = build(model.parameters(), **{"lr": 0.1, **options})
    if not type(optimizer).__name__.endswith("Closure"):
        optimizer.train()
    for seed in range(steps):
        step(model, optimizer, seed)
    return optimizer
