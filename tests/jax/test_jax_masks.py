"""A decay mask is a tree, or a function of the params as the user has them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sf_jax

LR, DECAY = 0.5, 0.25


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """A pytree that is called with inputs, as an Equinox module is."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        return self.weight @ x + self.bias

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key("weight"), self.weight), (key("bias"), self.bias)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def params(dtype=jnp.float32):
    return Module(jnp.full((2, 2), 2.0, dtype), jnp.full(2, 2.0, dtype))


# With gradients 0 the first step is the decay alone, z' = z - lr λ z. ScheduleFree+
# takes λ times the square of a step size that is lr where the loss is sqrt(π/2) Σ|g|.
OPTIMIZERS = {
    "sgd": sf_jax.schedule_free_sgd,
    "adamw": sf_jax.schedule_free_adamw,
    "radam": partial(sf_jax.schedule_free_radam, silent_sgd_phase=False),
    "gpa": sf_jax.gpa_adamw,
    "gpa_upstream": partial(sf_jax.gpa_adamw, upstream_compatible=True),
}
MASKS = {
    "tree": Module(True, False),
    "function": lambda p: Module(p.weight.ndim > 1, p.bias.ndim > 1),
    "partial": jax.tree_util.Partial(lambda p: jax.tree.map(lambda a: a.ndim > 1, p)),
    "dtype": lambda p: Module(p.weight.dtype == jnp.bfloat16, False),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_say_which_leaves_decay(optimizer, mask):
    tx = OPTIMIZERS[optimizer](LR, weight_decay=DECAY, mask=MASKS[mask])
    p = params(jnp.bfloat16)
    zeros = jax.tree.map(jnp.zeros_like, p)
    _, state = tx.update(zeros, tx.init(p), p)
    np.testing.assert_allclose(state.z.weight, 2 * (1 - LR * DECAY), rtol=1e-6)
    np.testing.assert_array_equal(state.z.bias, p.bias)


@pytest.mark.parametrize("mask", ["tree", "dtype"])
def test_masks_of_schedule_free_plus(mask):
    """lr_k = f / (sqrt(π/2) Σ|g|) = 1 with the loss below, and Adam's step is ±1."""
    p = params(jnp.bfloat16)
    ones = jax.tree.map(jnp.ones_like, p)
    got = {}
    for decay in (0.0, DECAY):
        tx = sf_jax.schedule_free_plus(weight_decay=decay, mask=MASKS[mask])
        loss = np.sqrt(np.pi / 2) * 6
        _, state = tx.update(ones, tx.init(p), p, value=loss)
        got[decay] = state.z
    np.testing.assert_allclose(
        got[0.0].weight - got[DECAY].weight, DECAY * 2, rtol=1e-5
    )
    np.testing.assert_array_equal(got[0.0].bias, got[DECAY].bias)


@pytest.mark.parametrize("row_b2", [None, 0.9], ids=["muon", "normuon"])
def test_trees_that_can_be_called_are_trees_for_muon_too(row_b2):
    numbers = Module(optax.contrib.MuonDimensionNumbers(), None)
    p = params()
    states = []
    for dimensions in (numbers, lambda _: numbers):
        tx = sf_jax.schedule_free_muon(
            LR,
            row_b2=row_b2,
            weight_decay=DECAY,
            weight_decay_mask=MASKS["tree"],
            muon_weight_dimension_numbers=dimensions,
        )
        states.append(tx.update(p, tx.init(p), p)[1])
    jax.tree.map(np.testing.assert_array_equal, states[0].z, states[1].z)
