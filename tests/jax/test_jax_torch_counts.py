"""Counts and powers beside the arrays of a PyTorch state arrive in JAX, or raise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sf_jax
import sf_torch
from sf_jax.torch_checkpoint import from_torch, to_torch

LR, B2, MORE = 0.01, 0.9, 5
ENOUGH = 158  # the first n with 0.9 ** n <= 2 ** -24


def gradients(k):
    rng = np.random.default_rng(k)
    return {
        "weight": rng.standard_normal((2, 3)).astype("float32"),
        "bias": rng.standard_normal(2).astype("float32"),
    }


def torch_steps(model, optimizer, ks, late=0):
    for k in ks:
        for name, p in model.named_parameters():
            has_one = name == "weight" or k >= late
            p.grad = torch.tensor(gradients(k)[name]) if has_one else None
        optimizer.step()


def jax_steps(tx, params, state, ks):
    step = jax.jit(tx.update)
    for k in ks:
        g = gradients(k)
        grads = {"kernel": g["weight"].T, "bias": g["bias"]}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, sf_jax.eval_params(state, params)


def started(make, steps, late=0):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    optimizer.train()
    torch_steps(model, optimizer, range(steps), late)
    return model, optimizer


def like_params():
    return {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}


def port(model, optimizer, tx):
    params = like_params()
    return from_torch(
        model.state_dict(), optimizer.state_dict(), params, tx.init(params)
    )


def assert_goes_on(model, optimizer, tx, start):
    run = port(model, optimizer, tx)
    ks = range(start, start + MORE)
    ys, xs = jax_steps(tx, run.params, run.opt_state, ks)
    torch_steps(model, optimizer, ks)
    weight, bias = optimizer.eval_params()
    right = [model.weight.T, model.bias, weight.T, bias]
    ours = [ys["kernel"], ys["bias"], xs["kernel"], xs["bias"]]
    for a, b in zip(ours, right, strict=True):
        np.testing.assert_allclose(a, b.detach(), rtol=0, atol=1e-6)


def adamw(**options):
    return lambda params: sf_torch.AdamWScheduleFree(
        params, lr=LR, betas=(0.9, B2), **options
    )


TX = sf_jax.schedule_free_adamw(LR, b2=B2)


@pytest.mark.parametrize("own", [1, ENOUGH - 1])
def test_a_count_of_its_own_is_refused_while_it_shows(own):
    model, optimizer = started(adamw(), 3 + own, late=3)
    assert optimizer.state[model.bias]["missed"] == 3
    message = (
        rf"bias had no gradient in 3 of {3 + own} steps.*corrects its bias by the "
        rf"{own} that.*until it has taken {ENOUGH}.*delete 'missed'"
    )
    with pytest.raises(ValueError, match=message) as error:
        port(model, optimizer, TX)
    assert "misshapen" not in str(error.value)
    assert "weight had" not in str(error.value)


def test_a_count_of_its_own_is_accepted_where_it_does_not_show():
    model, optimizer = started(adamw(), 3 + ENOUGH, late=3)
    assert optimizer.state[model.bias]["missed"] == 3
    assert_goes_on(model, optimizer, TX, 3 + ENOUGH)


def test_the_slower_of_two_moments_decides():
    model, optimizer = started(adamw(inner_momentum=0.99), 3 + ENOUGH, late=3)
    tx = sf_jax.schedule_free_adamw(LR, b2=B2, inner_momentum=0.99)
    with pytest.raises(ValueError, match="until it has taken 1656"):  # 0.99 ** 1656
        port(model, optimizer, tx)


def test_the_group_s_count_goes_on_in_jax():
    model, optimizer = started(adamw(upstream_compatible=True), 6, late=3)
    optimizer.state[model.bias]["missed"] = 3  # as of a run before it was given
    assert_goes_on(model, optimizer, TX, 6)


def test_no_step_missed_is_no_difference():
    model, optimizer = started(adamw(), 4)
    assert optimizer.state[model.bias]["missed"] == 0
    assert_goes_on(model, optimizer, TX, 4)


@pytest.mark.parametrize(("r", "power"), [(0.0, 2.0), (1.5, 2.0), (0.5, 1.0)])
def test_the_powers_of_a_wrapper_s_weights_arrive(r, power):
    """A learning rate that falls, so that lr_max and lr are apart."""

    def make(params):
        base = torch.optim.SGD(params, lr=LR)
        return sf_torch.ScheduleFreeWrapper(base, r=r, weight_lr_power=power)

    def halved(params):
        optimizer = make(params)
        optimizer.param_groups[0]["lr"] = 2 * LR
        return optimizer

    model, optimizer = started(halved, 5)
    optimizer.param_groups[0]["lr"] = LR
    tx = sf_jax.schedule_free(optax.sgd(LR), LR, r=r, weight_lr_power=power)
    run = port(model, optimizer, tx)
    saved = to_torch(
        run.params, run.opt_state, model.state_dict(), optimizer.state_dict()
    )[1]["param_groups"][0]
    group = optimizer.param_groups[0]
    assert saved["weight_sum"] == pytest.approx(group["weight_sum"], rel=1e-6)
    assert_goes_on(model, optimizer, tx, 5)
