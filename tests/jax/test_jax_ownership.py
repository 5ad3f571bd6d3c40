"""x outlives the next donated step, the leaves that nothing averages included."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import sf_jax
import sf_jax.flax

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 4), "frozen": jnp.arange(3.0), "n": np.ones(2)}
LABELS = {"w": "free", "frozen": "frozen", "n": "frozen"}


def partitioned(**options):
    return optax.partition(
        {
            "free": sf_jax.schedule_free_sgd(0.1, **options),
            "frozen": optax.set_to_zero(),
        },
        LABELS,
    )


def addresses(tree):
    return {
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }


def delete(tree):
    """What a donated step leaves of its arguments."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def copies(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("options", [{}, {"store_x": True}, {"b1": 1.0}], ids=str)
@pytest.mark.parametrize("function", [sf_jax.eval_params, sf_jax.train_params])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_x_and_y_outlive_their_arguments(function, wrap, options):
    params = copies(PARAMS)
    state = partitioned(**options).init(params)
    before = jax.tree.map(np.array, params)
    got = wrap(function)(state, params)
    assert not addresses(got) & addresses((state, params))
    delete((state, params))
    jax.tree.map(np.testing.assert_array_equal, got, before)


def test_numpy_leaves_are_copied_too():
    params = jax.tree.map(np.array, PARAMS)
    got = sf_jax.eval_params(partitioned().init(params), params)
    params["n"][:] = 7
    np.testing.assert_array_equal(got["n"], np.ones(2))


def test_jit_may_donate_what_x_is_made_of():
    params = copies(PARAMS)
    state = partitioned().init(params)
    before = jax.tree.map(np.array, params)
    got = jax.jit(sf_jax.eval_params, donate_argnums=1)(state, params)
    jax.tree.map(np.testing.assert_array_equal, got, before)


class TrainState(train_state.TrainState):
    batch_stats: Any


@pytest.mark.filterwarnings("ignore:.* were taken at y")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_linen_variables_outlive_a_donated_step(wrap):
    net = nn.BatchNorm(use_running_average=True)
    variables = net.init(jax.random.key(0), jnp.ones((2, 2)))
    state = TrainState.create(
        apply_fn=net.apply, tx=sf_jax.schedule_free_sgd(0.1), **variables
    )
    best = wrap(sf_jax.flax.eval_variables)(state)
    step = partial(jax.jit, donate_argnums=0)(
        lambda s: s.apply_gradients(grads=s.params)
    )
    expected = net.apply(variables, jnp.full((2, 2), 3.0))
    assert not addresses(best) & addresses(state)
    step(state)
    delete(state)
    np.testing.assert_array_equal(net.apply(best, jnp.full((2, 2), 3.0)), expected)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x, layers=(), rngs=None):
        assert list(layers) in ([], [1, 2])
        return self.last(self.dropout(self.norm(self.first(x)), rngs=rngs))


def nnx_pair():
    model = Net(nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.PathContains("last"))
    return model, nnx.Optimizer(model, sf_jax.schedule_free_sgd(0.1), wrt=wrt)


@pytest.mark.filterwarnings("ignore:.* were taken at y")
@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_an_nnx_model_at_x_shares_nothing(wrap):
    model, optimizer = nnx_pair()
    at_x = wrap(sf_jax.flax.eval_model)(optimizer, model)
    assert not addresses(nnx.state(at_x)) & addresses(nnx.state((model, optimizer)))
    expected = model.last.kernel[...].copy()
    delete(nnx.state((model, optimizer), nnx.Not(nnx.RngState)))
    np.testing.assert_array_equal(at_x.last.kernel[...], expected)
    assert at_x(jnp.ones((1, 2))).shape == (1, 2)


# What the adapters are called with

INPUTS = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_rngs_and_lists_may_be_keyword_arguments_of_nnx(wrap):
    model, optimizer = nnx_pair()
    plain = sf_jax.flax.eval_model(optimizer, model, INPUTS)
    rngs = nnx.Rngs(3)

    @wrap
    def at_x(optimizer, model, rngs):
        return sf_jax.flax.eval_model(
            optimizer, model, INPUTS, layers=[1, 2], rngs=rngs
        )

    # The dropout lies behind the norm.
    got = at_x(optimizer, model, rngs)
    np.testing.assert_allclose(got.norm.mean[...], plain.norm.mean[...], rtol=1e-6)
    assert int(rngs.default.count[...]) == 0


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, layers=()):
        x = x["image"] if isinstance(x, dict) else x
        return nn.BatchNorm(use_running_average=not train)(x)


def linen_state():
    net = Linen()
    variables = net.init(jax.random.key(0), INPUTS[0])
    return TrainState.create(
        apply_fn=net.apply, tx=sf_jax.schedule_free_sgd(0.1), **variables
    )


BATCHES = {
    "inputs": list(INPUTS),
    "tuples": [(batch, np.zeros(8)) for batch in INPUTS],
    "lists": [[batch, np.zeros(8)] for batch in INPUTS],
    "dicts": [{"image": batch, "label": np.zeros(8)} for batch in INPUTS],
}


@pytest.mark.parametrize("batches", BATCHES)
def test_linen_takes_the_batches_that_update_bn_takes(batches):
    got = sf_jax.flax.eval_variables(
        linen_state(), BATCHES[batches], train=True, layers=[1, 2]
    )
    (stats,) = got["batch_stats"].values()
    np.testing.assert_allclose(stats["mean"], INPUTS.mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("batches", ["tuples", "lists"])
def test_nnx_takes_the_batches_that_update_bn_takes(batches):
    model, optimizer = nnx_pair()
    plain = sf_jax.flax.eval_model(optimizer, model, INPUTS)
    got = sf_jax.flax.eval_model(optimizer, model, BATCHES[batches])
    np.testing.assert_allclose(got.norm.mean[...], plain.norm.mean[...], rtol=1e-6)


def test_wrong_objects_are_told_what_is_right():
    model, optimizer = nnx_pair()
    with pytest.raises(TypeError, match="got Net and Optimizer"):
        sf_jax.flax.eval_model(model, optimizer)
    for arguments in ((optimizer,), (optimizer, nnx.state(model, nnx.Param))):
        with pytest.raises(ValueError, match=r"eval_model\(optimizer, model\)"):
            sf_jax.eval_params(*arguments)
    with pytest.raises(Exception) as error:  # the model's own
        sf_jax.flax.eval_model(optimizer, model, BATCHES["dicts"])
    assert any("'image', 'label'" in note for note in error.value.__notes__)
