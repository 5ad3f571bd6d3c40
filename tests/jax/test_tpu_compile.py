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
from jax_steps import (
    FAMILY,
    OPTIMIZERS,
    OVER_OPTAX,
    SIXTEEN_BITS,
    accessed,
    compile_step,
)

pytest.importorskip("libtpu", reason="libtpu is not installed; `make tpu` brings it")

# libtpu would otherwise look for the machine it runs on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Nothing here uses a TPU, so others may hold its lock.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
LEAF = 2**27
SCALARS = 0.1  # of a leaf: what scalars and the compiler's padding may add

pytestmark = [pytest.mark.tpu, pytest.mark.usefixtures("ahead_of_time")]


def sharding_on(topology):
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return lambda leaf: SingleDeviceSharding(description.devices[0])


def compile_for_tpu(tx, dtype, topology, shape=(LEAF,)):
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    return compile_step(tx, leaf, sharding_on(topology))


@pytest.mark.parametrize(
    ("name", "topology"),
    [(name, topology) for topology in TOPOLOGIES for name in OPTIMIZERS]
    # One rule moves them all, so one topology will do for the rest of the family.
    + [(name, TOPOLOGIES[0]) for name in FAMILY],
)
@pytest.mark.parametrize(
    ("dtype", "store_x"),
    [(jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)],
    ids=["lean", "stored", "bfloat16"],
)
def test_a_step_is_one_pass_over_memory(name, dtype, store_x, topology):
    """But for the sums of ScheduleFree+, which are a pass of their own."""
    optimizer = (OPTIMIZERS | FAMILY)[name]
    compiled = compile_for_tpu(optimizer.make(store_x=store_x), dtype, topology)

    half = jnp.dtype(dtype).itemsize / 4
    has_x = store_x or half < 1
    memory = compiled.memory_analysis()
    # AdamW: 7, SGD: 5.
    assert accessed(compiled, LEAF) <= optimizer.arrays(has_x, half) + SCALARS
    assert memory.temp_size_in_bytes < 4096
    # Everything that is written is written in place.
    written = 1 + has_x + optimizer.moments + half
    assert memory.alias_size_in_bytes >= written * 4 * LEAF


@pytest.mark.parametrize(
    ("name", "topology"),
    [("adamw", topology) for topology in TOPOLOGIES]
    + [(name, TOPOLOGIES[0]) for name in SIXTEEN_BITS if name != "adamw"],
)
def test_sixteen_bits_with_their_random_bits_are_one_pass_too(name, topology):
    make, arrays = SIXTEEN_BITS[name]
    compiled = compile_for_tpu(make(), jnp.bfloat16, topology, (2 * LEAF,))
    memory = compiled.memory_analysis()
    # Twice as many elements of half the size: again in arrays of 4 LEAF bytes.
    assert accessed(compiled, LEAF) <= arrays + SCALARS
    assert memory.temp_size_in_bytes < 4096
    # Read and written, but for the gradient, which is only read.
    assert memory.alias_size_in_bytes >= (arrays - 1) // 2 * 4 * LEAF


@pytest.mark.parametrize("name", OVER_OPTAX)
def test_over_a_base_of_optax_only_y_comes_on_top(name):
    ours, base = OVER_OPTAX[name]
    shape = (2**13, LEAF // 2**13)
    both = [
        compile_for_tpu(tx, jnp.float32, TOPOLOGIES[0], shape) for tx in (base, ours())
    ]
    arrays = [accessed(compiled, LEAF) for compiled in both]
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in both]
    assert arrays[1] - arrays[0] <= 2 + SCALARS
    assert temporaries[1] - temporaries[0] < 4096


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_limit_would_catch_a_second_pass(name):
    """A step that looks at the whole new z before it moves y must fail the limit."""
    optimizer = OPTIMIZERS[name]
    tx = optimizer.make()

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return updates / jnp.linalg.norm(state.z), state

    compiled = compile_for_tpu(
        optax.GradientTransformation(tx.init, update), jnp.float32, TOPOLOGIES[0]
    )
    assert accessed(compiled, LEAF) > optimizer.arrays(has_x=False) + SCALARS


def test_flatten_is_no_gain_on_tpus():
    """It gathers parameters and gradients and splits the updates: more traffic yet."""
    tx = OPTIMIZERS["adamw"].make()
    leaves = [jax.ShapeDtypeStruct((LEAF // 16,), jnp.float32)] * 16
    plain, flat = (
        compile_step(t, leaves, sharding_on(TOPOLOGIES[0]))
        for t in (tx, optax.flatten(tx))
    )
    assert accessed(flat, LEAF) > 1.5 * accessed(plain, LEAF)
    assert plain.memory_analysis().temp_size_in_bytes < 4096
    assert flat.memory_analysis().temp_size_in_bytes > 2 * 4 * LEAF
