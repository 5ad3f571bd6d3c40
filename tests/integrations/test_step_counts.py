"""Numbers of steps from a command line: 100.0 is a whole number, 0.25 is not."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sf_jax
import sf_torch

COUNTS = ("warmup_steps", "c_warmup", "sf_beta1_anneal_steps")


def with_counts(module):
    """Every public optimizer with an argument that counts steps, and that argument."""
    for name in module.__all__:
        made = getattr(module, name)
        for argument in inspect.signature(made).parameters if callable(made) else ():
            if argument in COUNTS:
                yield pytest.param(made, argument, id=f"{name}-{argument}")


in_torch = pytest.mark.parametrize(("make", "argument"), list(with_counts(sf_torch)))
in_jax = pytest.mark.parametrize(("make", "argument"), list(with_counts(sf_jax)))
no_counts = pytest.mark.parametrize("value", [0.25, 2.5, np.float32(0.5), float("nan")])
wholes = pytest.mark.parametrize("whole", [0, 2])


def over(params, make, **options):
    """The optimizer over these parameters; a wrapper is over another one."""
    if make in (sf_torch.ScheduleFreeWrapper, sf_torch.ScheduleFreeWrapperClosure):
        params = torch.optim.SGD(params, lr=0.1)
    return make(params, **options)


def torch_run(make, options):
    w = torch.nn.Parameter(torch.tensor([[3.0, -2.0], [1.0, 0.5]]))
    optimizer = over([w], make, **options)
    optimizer.train()

    def closure():
        w.grad = 2 * w.detach()
        return w.detach().square().sum()

    for _ in range(4):
        optimizer.step(closure)
    return w.detach().numpy()


def jax_run(make, options):
    optimizer = make(**options)
    params = {"w": jnp.asarray([[3.0, -2.0], [1.0, 0.5]])}
    state = optimizer.init(params)
    loss = lambda p: jnp.sum(p["w"] ** 2)  # noqa: E731
    extra = {}
    for _ in range(2):
        value, grads = jax.value_and_grad(loss)(params)
        if make is sf_jax.schedule_free_plus:
            extra = {"value": value}
        updates, state = optimizer.update(grads, state, params, **extra)
        params = jax.tree.map(jnp.add, params, updates)
    return np.asarray(params["w"])


def jax_run_sgd(learning_rate, warmup_steps):
    """w after one step of gradient descent on w², from 1: 1 - 2 lr."""
    optimizer = sf_jax.schedule_free_sgd(learning_rate, warmup_steps)
    w = jnp.asarray(1.0)
    return w + optimizer.update(2 * w, optimizer.init(w), w)[0]


@in_torch
@wholes
def test_torch_takes_whole_numbers_of_any_type(make, argument, whole):
    as_int = torch_run(make, {argument: whole})
    for number in (float(whole), np.float32(whole), np.int64(whole)):
        np.testing.assert_array_equal(torch_run(make, {argument: number}), as_int)


@in_jax
def test_jax_takes_whole_numbers_of_any_type(make, argument):
    as_int = jax_run(make, {"learning_rate": 0.1, argument: 2})
    run = jax_run(make, {"learning_rate": 0.1, argument: 2.0})
    np.testing.assert_array_equal(run, as_int)


@pytest.mark.parametrize("zero", [0, 0.0])
def test_jax_turns_warmup_off_by_zero_of_any_type(zero):
    run = lambda lr: jax_run_sgd(lr, zero)  # noqa: E731
    assert float(run(0.1)) == pytest.approx(0.8)
    assert float(jax.grad(run)(0.1)) == pytest.approx(-2.0)


@in_torch
@no_counts
def test_torch_refuses_a_share_of_the_run(make, argument, value):
    w = torch.nn.Parameter(torch.ones(2))
    words = f"{argument} must be .*whole number in .*got .*{value}.*that share times"
    with pytest.raises(TypeError, match=words):
        over([w], make, **{argument: value})


@in_jax
@no_counts
def test_jax_refuses_a_share_of_the_run(make, argument, value):
    words = f"{argument} must be .*whole number in .*got .*{value}.*that share times"
    with pytest.raises(TypeError, match=words):
        make(learning_rate=0.1, **{argument: value})
