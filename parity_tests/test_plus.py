"""ScheduleFree+ with gradients that were clipped before its step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry import OPTIMIZERS

STEPS, MAX_NORM = 20, 0.1
RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=(4, 3)), "b": RNG.normal(size=3)}
# The first gradients are too small to be clipped.
STREAM = [
    {n: (0.01 if k < 2 else 1.0) * RNG.normal(size=p.shape) for n, p in PARAMS.items()}
    for k in range(STEPS)
]
OPTIONS: dict[str, Any] = {"polyak_beta": 0.5, "weight_decay": 0.01, "c_warmup": 3}


def norm_of(grads):
    return math.sqrt(sum(np.sum(g**2) for g in grads.values()))


def clipped(grads):
    factor = min(1.0, MAX_NORM / norm_of(grads))
    return {n: factor * g for n, g in grads.items()}


def in_numpy():
    plus = OPTIMIZERS["plus"]
    options = plus.options(lr=1.0, inner_momentum=0.9, b2=0.95, **OPTIONS)
    rule = reference.ScheduleFree(PARAMS, [(tuple(PARAMS), plus.reference(options))])
    for grads in STREAM:
        rule.step(clipped(grads), 1.0, norm_of(grads))
        yield rule.y


def in_jax():
    clip = optax.clip_by_global_norm(MAX_NORM)
    tx = optax.chain(clip, sf_jax.schedule_free_plus(**OPTIONS))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        norm = optax.tree.norm(grads)
        updates, state = tx.update(grads, state, params, value=1.0, grad_norm=norm)
        return optax.apply_updates(params, updates), state

    for grads in STREAM:
        params, state = step(params, state, grads)
        yield jax.tree.map(np.asarray, params)


def in_torch():
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in PARAMS.items()}
    optimizer = sf_torch.AdamCScheduleFreePlus(params.values(), **OPTIONS)
    optimizer.train()
    for grads in STREAM:
        for n, p in params.items():
            p.grad = torch.tensor(clipped(grads)[n])  # clip_grad_norm_ adds 1e-6
        optimizer.step_func(function_value=1.0, grad_norm=norm_of(grads))
        yield {n: p.detach().numpy().copy() for n, p in params.items()}


def from_the_formula():
    """y by the sums over whole gradients, and moments of the clipped ones."""
    z, x, y = (dict(PARAMS) for _ in range(3))
    m, v = ({n: np.zeros_like(p) for n, p in PARAMS.items()} for _ in range(2))
    e = lr_max = weights = 0.0
    beta, b1, b2 = 0.9, 0.9, 0.95
    for k, grads in enumerate(STREAM):
        inner = beta * sum(np.sum(g * (z[n] - x[n])) for n, g in grads.items())
        size = math.sqrt(math.pi / 2) * sum(np.abs(g).sum() for g in grads.values())
        e = 0.5 * e + 0.5 * size
        lr = max(0.0, 1.0 + inner) * (1 - 0.5 ** (k + 1)) / e
        lr_max, c = max(lr_max, lr), 1.0
        if k >= OPTIONS["c_warmup"]:
            weights += lr_max**2
            c = lr_max**2 / weights
        for n, g in clipped(grads).items():
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * g**2
            root = np.sqrt(v[n] / (1 - b2 ** (k + 1))) + 1e-8
            z[n] = z[n] - lr * m[n] / (1 - b1 ** (k + 1)) / root
            z[n] = z[n] - OPTIONS["weight_decay"] * lr**2 * y[n]
            x[n] = (1 - c) * x[n] + c * z[n]
            y[n] = (1 - beta) * z[n] + beta * x[n]
        yield dict(y)


@pytest.mark.parametrize("run", [in_numpy, in_jax, in_torch])
def test_a_clipped_run_takes_the_steps_of_whole_gradients(run):
    with jax.enable_x64(True):
        for k, (ours, right) in enumerate(zip(run(), from_the_formula(), strict=True)):
            for n in PARAMS:
                np.testing.assert_allclose(
                    ours[n], right[n], rtol=0, atol=1e-9, err_msg=f"{n} at step {k}"
                )
