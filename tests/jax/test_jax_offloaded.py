"""Parameters and state in the host's memory: init, and x, wherever they lie."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import sf_jax

MAKE = {
    "sgd": sf_jax.schedule_free_sgd,
    "adamw": partial(sf_jax.schedule_free_adamw, inner_momentum=0.9),
    "stored": partial(sf_jax.schedule_free_adamw, store_x=True),
    "normuon": partial(sf_jax.schedule_free_muon, row_b2=0.9),
    "prodigy": sf_jax.schedule_free_prodigy,  # keeps the first z
}
KINDS = ("device", "pinned_host")
HAS_BOTH = set(KINDS) <= {m.kind for m in jax.devices()[0].addressable_memories()}
pytestmark = pytest.mark.skipif(not HAS_BOTH, reason="a JAX with one memory on CPUs")


@pytest.fixture(scope="module", params=["sharded", "single"])
def sharding(request):
    if request.param == "single":
        return SingleDeviceSharding(jax.devices()[0])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("data"))


def put(tree, sharding, kind):
    """The arrays of the tree there; numbers stay where they are."""
    place = sharding.with_memory_kind(kind)
    return jax.tree.map(lambda a: jax.device_put(a, place) if a.ndim else a, tree)


def kind_of(array):
    return array.sharding.memory_kind


@pytest.mark.parametrize("name", MAKE)
def test_a_state_is_made_where_its_parameters_lie(name, sharding):
    params = put({"w": jnp.ones((8, 16))}, sharding, "pinned_host")
    init = MAKE[name]().init
    expected = init({"w": jnp.ones((8, 16))})
    for state in (init(params), jax.jit(init)(params)):
        for leaf, value in zip(
            jax.tree.leaves(state), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(leaf, value)
            if leaf.ndim == 2:
                assert kind_of(leaf) == "pinned_host"


@pytest.mark.parametrize("name", ["sgd", "stored"])
def test_x_is_found_wherever_state_and_parameters_lie(name, sharding):
    tx, params = MAKE[name](b1=0.5), {"w": jnp.ones((8, 16))}
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    expected = state.z["w"]  # after one step x is z
    for of_params in KINDS:
        for of_state in KINDS:
            y, held = put(params, sharding, of_params), put(state, sharding, of_state)
            for wrap in (lambda f: f, jax.jit):
                x = wrap(sf_jax.eval_params)(held, y)
                np.testing.assert_allclose(x["w"], expected, rtol=1e-6)
                back = wrap(sf_jax.train_params)(held, x)
                np.testing.assert_allclose(back["w"], params["w"], rtol=1e-6)
                assert kind_of(x["w"]) == kind_of(back["w"]) == of_params
            if name == "stored":
                sf_jax.check_params(held, y)


def test_an_offloaded_state_is_fetched_for_its_step(sharding):
    """As the documents have it: the step is in the device's memory."""
    tx, params = MAKE["adamw"](), put({"w": jnp.ones((8, 16))}, sharding, "device")
    state = put(tx.init(params), sharding, "pinned_host")

    @jax.jit
    def step(params, state):
        inside = jax.device_put(state, jax.memory.Space.Device)
        updates, inside = tx.update(params, inside, params)
        params = optax.apply_updates(params, updates)
        return params, jax.device_put(inside, jax.memory.Space.Host)

    expected = tx.update({"w": jnp.ones((8, 16))}, tx.init(params), params)[1]
    params, state = step(params, state)
    assert kind_of(state.z["w"]) == "pinned_host"
    np.testing.assert_allclose(state.z["w"], expected.z["w"], rtol=1e-6)
