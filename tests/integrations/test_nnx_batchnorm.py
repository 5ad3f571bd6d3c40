"""An NNX classifier with BatchNorm on real digits: x needs statistics of its own."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import sf_jax
import sf_jax.flax

DIGITS = load_digits()
INPUTS = np.float32(DIGITS.data[:1024] / 16).reshape(16, 64, 64)
LABELS = DIGITS.target[:1024].reshape(16, 64)
UNSEEN = np.float32(DIGITS.data[1024:] / 16)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.norm(self.hidden(x))))


@nnx.jit
def accuracy(model):
    return (model(UNSEEN).argmax(-1) == DIGITS.target[1024:]).mean()


@nnx.jit
def train_step(model, optimizer, inputs, labels):
    def loss(model):
        logits = model(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def test_statistics_taken_at_x_are_worth_the_pass():
    """Those of y also lag behind, at the momentum of 0.99 that BatchNorm has in NNX."""
    model = Net(nnx.Rngs(0))
    tx = sf_jax.schedule_free_sgd(5.0, warmup_steps=8, b1=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for inputs, labels in zip(INPUTS, LABELS, strict=True):
        train_step(model, optimizer, inputs, labels)
    with pytest.warns(UserWarning, match=r"the nnx.BatchStat of Net were taken at y"):
        with_those_of_y = sf_jax.flax.eval_model(optimizer, model)
    with_its_own = sf_jax.flax.eval_model(optimizer, model, INPUTS)
    assert accuracy(with_its_own) > 0.88
    assert accuracy(with_those_of_y) < accuracy(with_its_own) - 0.1


def test_without_batchnorm_there_is_nothing_to_warn_of():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sf_jax.schedule_free_sgd(), wrt=nnx.Param)
    sf_jax.flax.eval_model(optimizer, model)


def test_a_linen_state_with_batch_stats_warns_too():
    params = {"scale": jnp.ones(2)}
    state = SimpleNamespace(
        params=params,
        opt_state=sf_jax.schedule_free_sgd().init(params),
        batch_stats={"mean": jnp.ones(2)},
    )

    with pytest.warns(UserWarning, match="batch_stats were taken at y"):
        sf_jax.flax.eval_variables(state)
