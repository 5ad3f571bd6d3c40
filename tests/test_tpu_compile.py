"""The step compiled ahead of time for TPUs: one pass over memory, no temporaries.

Runs on any machine where libtpu installs (`make tpu`); what it asserts is the
compiler's own report. Leaves are large, since small ones stay in a chip's vector
memory, where bytes accessed mean something else.
"""

import os

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax_steps import OPTIMIZERS, compile_step

pytest.importorskip("libtpu", reason="libtpu is not installed; `make tpu` brings it")

# libtpu would otherwise look for the machine it runs on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Nothing here uses a TPU, so others may hold its lock.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
LEAF = 2**27
SCALARS = 0.1  # of a leaf: what scalars and the compiler's padding may add

pytestmark = pytest.mark.xdist_group("libtpu")  # one process at a time may hold it


def sharding_on(topology):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return SingleDeviceSharding(description.devices[0])


def compile_for_tpu(tx, dtype, topology):
    leaf = jax.ShapeDtypeStruct((LEAF,), dtype)
    return compile_step(tx, leaf, sharding_on(topology))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("dtype", "store_x"),
    [(jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)],
    ids=["lean", "stored", "bfloat16"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_one_pass_over_memory(name, dtype, store_x, topology):
    factory, options, moments = OPTIMIZERS[name]
    compiled = compile_for_tpu(factory(store_x=store_x, **options), dtype, topology)

    has_x = store_x or dtype == jnp.bfloat16
    # In float32 arrays: each of z, x and the moments is read and written, and so is
    # the parameter; the gradient is read. AdamW: 7, SGD: 5.
    half = jnp.dtype(dtype).itemsize / 4
    expected = 2 * (1 + has_x + moments) + 3 * half
    accessed = compiled.cost_analysis()["bytes accessed"] / (4 * LEAF)
    memory = compiled.memory_analysis()
    assert accessed <= expected + SCALARS
    assert memory.temp_size_in_bytes < 4096
    # Everything that is written is written in place.
    assert memory.alias_size_in_bytes >= (expected - half) / 2 * 4 * LEAF


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_limit_would_catch_a_second_pass(name):
    """A step that looks at the whole new z before it moves y must fail the limit."""
    factory, options, moments = OPTIMIZERS[name]
    tx = factory(**options)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return updates / jnp.linalg.norm(state.z), state

    compiled = compile_for_tpu(
        optax.GradientTransformation(tx.init, update), jnp.float32, TOPOLOGIES[0]
    )
    accessed = compiled.cost_analysis()["bytes accessed"] / (4 * LEAF)
    assert accessed > 5 + 2 * moments + SCALARS


def test_flatten_is_no_gain_on_tpus():
    """It gathers parameters and gradients and splits the updates: more traffic yet."""
    factory, options, _ = OPTIMIZERS["adamw"]
    tx = factory(**options)
    leaves = [jax.ShapeDtypeStruct((LEAF // 16,), jnp.float32)] * 16
    plain, flat = (
        compile_step(t, leaves, sharding_on(TOPOLOGIES[0]))
        for t in (tx, optax.flatten(tx))
    )
    accessed = [c.cost_analysis()["bytes accessed"] for c in (plain, flat)]
    assert accessed[1] > 1.5 * accessed[0]
    assert plain.memory_analysis().temp_size_in_bytes < 4096
    assert flat.memory_analysis().temp_size_in_bytes > 2 * 4 * LEAF
