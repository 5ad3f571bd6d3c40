"""A tiny model, and what the trainers must make of it: the numbers of a bare loop."""

import itertools

import pytest
import torch
from torch_cases import values

import sf_torch

# Trainers take seconds to import: once.
together = pytest.mark.xdist_group("trainers")

INPUTS = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS.sum(1, keepdim=True)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )


BUILDS = {
    "adamw": lambda params: sf_torch.AdamWScheduleFree(params, lr=0.05),
    "wrapper": lambda params: sf_torch.ScheduleFreeWrapper(
        torch.optim.SGD(params, lr=0.1)
    ),
    "plus": lambda params: sf_torch.AdamCScheduleFreePlus(
        params, lr=0.5, polyak_beta=0.5, c_warmup=2
    ),
}
CLIP = 0.3  # which most gradients here are above
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def bare_steps(build, batch_size=4, model=None, clip=None):
    """x and y after every step of training without any trainer, epoch after epoch."""
    model = network() if model is None else model
    optimizer = build(model.parameters())
    optimizer.train()
    batches = zip(INPUTS.split(batch_size), TARGETS.split(batch_size), strict=True)
    for inputs, targets in itertools.cycle(batches):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.tell(grad_norm=norm)
        optimizer.step(lambda loss=loss: loss)
        yield optimizer.eval_params(), values(model)


def bare_loop(build, epochs, **options):
    """x and y after so many epochs of four steps."""
    return next(itertools.islice(bare_steps(build, **options), 4 * epochs - 1, None))


def close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
