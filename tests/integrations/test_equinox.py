"""Equinox models: the parameters are a filtered module, which can also be called."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sf_jax

NET = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
INPUTS = jax.random.normal(jax.random.key(1), (16, 2))


def loss(net):
    return jnp.mean((jax.vmap(net)(INPUTS) - 1) ** 2)


def test_a_model_is_trained_and_evaluated_at_x():
    """x is the mean of z: weight_lr_power=0 weighs all steps alike."""
    params, static = eqx.partition(NET, eqx.is_inexact_array)
    mask = jax.tree.map(lambda a: a.ndim > 1, params)  # callable as a whole
    tx = sf_jax.schedule_free_adamw(
        0.05, weight_decay=0.1, mask=mask, weight_lr_power=0.0
    )
    state, zs = tx.init(params), []

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: loss(eqx.combine(p, static)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = step(params, state)
        zs.append(state.z)
    x = sf_jax.eval_params(state, params)
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), 0), *zs)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=20 * 2**-23)
    assert loss(eqx.combine(x, static)) < loss(NET) / 2


def test_leaves_that_are_no_arrays_are_named():
    with pytest.raises(ValueError) as error:
        sf_jax.schedule_free_adamw(0.1).init(NET)
    assert ".activation is" in str(error.value)
    assert "eqx.filter(model, eqx.is_inexact_array)" in str(error.value)


class Temperature(eqx.Module):
    """Its one field has the name that boxes use."""

    value: jax.Array
    unit: str = eqx.field(static=True)


def test_a_field_may_be_called_value():
    params = {"a": Temperature(jnp.ones(2), "K"), "value": jnp.ones(3)}
    tx = sf_jax.schedule_free_sgd(0.1, store_x=True)
    updates, state = tx.update(params, tx.init(params), params)
    y = optax.apply_updates(params, updates)
    for x in (sf_jax.eval_params(state), sf_jax.eval_params(state, y)):
        np.testing.assert_allclose(x["a"].value, np.full(2, 0.9), rtol=1e-6)
        np.testing.assert_allclose(x["value"], np.full(3, 0.9), rtol=1e-6)
    assert x["a"].unit == "K"
