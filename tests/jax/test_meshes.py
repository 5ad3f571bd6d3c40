"""Sharded parameters: the state goes where they are, and a step talks to nobody.

On the eight virtual devices that conftest.py asks for. Run as a script, this file is
one process of the two-process test.
"""

import functools
import os
import re
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sf_jax

STEPS = 3
LAYOUTS = {"fsdp": P("data"), "tensor": P(None, "model"), "both": P("data", "model")}
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
OPTIMIZERS = {
    "sgd": partial(sf_jax.schedule_free_sgd, 0.1, warmup_steps=2, weight_decay=0.1),
    "adamw": partial(
        sf_jax.schedule_free_adamw, 0.01, weight_decay=0.1, inner_momentum=0.9
    ),
    "radam": partial(sf_jax.schedule_free_radam, 0.01, weight_decay=0.1),
    "wrapped": partial(sf_jax.schedule_free, optax.adamw(0.01, b1=0.5), 0.01),
}
# Every optimizer in one layout, and one optimizer in every layout.
CASES = [(name, "both") for name in OPTIMIZERS]
CASES += [("adamw", "fsdp"), ("adamw", "tensor")]
COLLECTIVE = re.compile(
    r"all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
)


def make_mesh(shape=(4, 2), axes=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axes, axes))


def make_params():
    """Leaves of one shape that are to be placed differently, and a narrow one."""
    values = np.linspace(-1, 1, 128, dtype=np.float32).reshape(8, 16)
    return {
        "w": values,
        "u": values[::-1].copy(),
        "half": values.astype(jnp.bfloat16),
        "bias": values[0],
        "scale": np.float32(0.5),
    }


def place(params, mesh, spec):
    """Matrices but u by the layout, the rest on every device."""
    specs = {name: spec if name in ("w", "half") else P() for name in params}
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in params.items()
    }


def make_update(tx):
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update


@jax.jit
def gradients(params):
    return jax.tree.map(lambda p: 3 * p, params)


def go_on(update, params, state, steps):
    for _ in range(steps):
        params, state = update(gradients(params), state, params)
    return params, state


def leaves_beside(tree, params):
    """Every leaf of the tree that belongs to one of params, beside it."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = getattr(path[-1], "key", None) if path else None
        if name in params:
            yield leaf, params[name]


def assert_placed_like(tree, params):
    pairs = list(leaves_beside(tree, params))
    assert len(pairs) >= len(params)
    for leaf, param in pairs:
        assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim)


def assert_close(actual, expected, ulps=4):
    """The compiler fuses multiply and add differently for parts of another shape."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        unit = 2.0**-23 * max(1.0, np.abs(e).max())
        np.testing.assert_allclose(a, e, rtol=0, atol=ulps * unit)


@pytest.fixture(scope="module")
def on_one_device():
    """run(name): params and state after an unsharded run."""

    @functools.cache
    def run(name):
        params, tx = jax.tree.map(jnp.asarray, make_params()), OPTIMIZERS[name]()
        return go_on(jax.jit(make_update(tx)), params, tx.init(params), STEPS)

    return run


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    name, layout = request.param
    return name, LAYOUTS[layout]


@pytest.fixture(scope="module")
def sharded(case):
    """A sharded run: where it started, where it ended, and the compiled update."""
    name, layout = case
    start = place(make_params(), make_mesh(), layout)
    tx = OPTIMIZERS[name]()
    state = jax.jit(tx.init)(start)
    update = jax.jit(make_update(tx)).lower(start, state, start).compile()
    return start, *go_on(update, start, state, STEPS), update.as_text()


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("wrap", [lambda init: init, jax.jit], ids=["eager", "jit"])
def test_the_state_takes_the_shardings_of_the_parameters(case, axes, wrap):
    name, layout = case
    mesh = make_mesh(axes=axes)
    params = place(make_params(), mesh, layout)
    with jax.set_mesh(mesh):
        state = wrap(OPTIMIZERS[name](store_x=True).init)(params)
    assert_placed_like(state, params)


def test_a_sharded_run_is_the_run_on_one_device(case, sharded, on_one_device):
    start, params, state, _ = sharded
    expected = on_one_device(case[0])
    assert_placed_like((params, state), start)
    assert_close((params, state), expected)

    x = sf_jax.eval_params(state, params)
    assert_placed_like(x, start)
    assert_placed_like(jax.jit(sf_jax.eval_params)(state, params), start)
    assert_close(x, sf_jax.eval_params(*reversed(expected)))


def test_an_update_talks_to_no_other_device(sharded):
    assert not COLLECTIVE.search(sharded[-1])


def test_a_collective_would_be_found():
    tx = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS["sgd"]())
    params = place(make_params(), make_mesh(), LAYOUTS["both"])
    lowered = jax.jit(make_update(tx)).lower(params, tx.init(params), params)
    assert COLLECTIVE.search(lowered.compile().as_text())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_shard_map(name, on_one_device):
    """Every device moves its own part; the scalars are the same on all."""
    mesh, tx = make_mesh(), OPTIMIZERS[name]()
    start = place(make_params(), mesh, LAYOUTS["both"])
    of_params = jax.tree.map(lambda leaf: leaf.sharding.spec, start)
    # Only the parameters' layout has to be said: init under jit finds the state's.
    state = jax.jit(tx.init)(start)
    of_state = jax.tree.map(lambda leaf: leaf.sharding.spec, state)

    update = jax.shard_map(
        make_update(tx),
        mesh=mesh,
        in_specs=(of_params, of_state, of_params),
        out_specs=(of_params, of_state),
    )
    x_of = jax.shard_map(
        sf_jax.eval_params,
        mesh=mesh,
        in_specs=(of_state, of_params),
        out_specs=of_params,
    )
    params, state = go_on(jax.jit(update), start, state, STEPS)
    expected = on_one_device(name)
    assert_close((params, state), expected)
    x = jax.jit(x_of)(state, params)
    assert_close(x, sf_jax.eval_params(*reversed(expected)))


def test_orbax_restores_onto_a_mesh_of_another_shape(tmp_path, on_one_device):
    tx = OPTIMIZERS["adamw"]()
    update = jax.jit(make_update(tx))
    start = place(make_params(), make_mesh((4, 2)), LAYOUTS["both"])
    run = go_on(update, start, jax.jit(tx.init)(start), steps=1)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=ocp.args.StandardSave(run))
        manager.wait_until_finished()

        start = place(make_params(), make_mesh((2, 4)), LAYOUTS["both"])
        target = (start, jax.jit(tx.init)(start))
        params, state = manager.restore(0, args=ocp.args.StandardRestore(target))
    assert_placed_like((params, state), start)
    assert_close(
        go_on(update, params, state, STEPS - 1),
        on_one_device("adamw"),
    )


def data_parallel_run(devices):
    """Losses and x of a regression: weights and batches sharded over the devices."""
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    sharding = NamedSharding(mesh, P("data"))

    def put(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, 4)).astype(np.float32)
    params = put(np.ones((4, 2), np.float32))
    tx = sf_jax.schedule_free_adamw(0.05, warmup_steps=3)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, inputs):
        loss, grads = jax.value_and_grad(lambda p: ((inputs @ p) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        x = sf_jax.eval_params(state, params)
        everywhere = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
        return params, state, loss, everywhere

    losses, xs = [], []
    for _ in range(5):
        params, state, loss, x = step(params, state, put(inputs))
        losses.append(np.asarray(loss))
        xs.append(np.asarray(x.addressable_data(0)))
    return np.array(losses), np.array(xs)


def test_two_processes_give_the_trajectory_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(process), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    losses, xs = data_parallel_run(jax.devices()[:1])
    for process in range(2):
        theirs = np.load(tmp_path / f"{process}.npz")
        # The mean over the batch is summed in another order.
        np.testing.assert_allclose(theirs["losses"], losses, rtol=1e-6)
        np.testing.assert_allclose(theirs["xs"], xs, rtol=1e-6)


def main():
    address, process, out = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    assert len(jax.devices()) == 2
    assert len(jax.local_devices()) == 1
    losses, xs = data_parallel_run(jax.devices())
    np.savez(f"{out}/{process}.npz", losses=losses, xs=xs)


if __name__ == "__main__":
    main()
