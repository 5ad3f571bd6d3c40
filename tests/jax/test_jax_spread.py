"""Optimizers that look at whole leaves, where leaves are spread over devices.

Muon multiplies matrices, Prodigy and ScheduleFree+ sum over all parameters. On a mesh
they must do it over all parts of a leaf, or say that they cannot. On the eight virtual
devices that conftest.py asks for.
"""

import contextlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sf_jax

MATRIX = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
MAKE = {
    "muon": sf_jax.schedule_free_muon,
    "normuon": partial(sf_jax.schedule_free_muon, row_b2=0.9),
    "prodigy": partial(sf_jax.schedule_free_prodigy, 1.0, estim_lr0=0.01),
    "plus": partial(sf_jax.schedule_free_plus, polyak_beta=0.5, weight_decay=1.0),
}
ACROSS = ("muon", "normuon", "prodigy")  # those that refuse parts
WHOLE = {"w": MATRIX, "u": MATRIX[::-1].copy(), "b": MATRIX[0]}
SPECS = {"w": P("data", "model"), "u": P(None, "model"), "b": P()}
EACH = 8.0  # how far apart the losses of two neighbours are


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def placed(mesh):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), WHOLE, SPECS
    )


def loss_of(params):
    return 1.5 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def step_of(tx):
    tx = optax.with_extra_args_support(tx)

    def step(params, state, loss):
        grads = jax.tree.map(lambda p: 3 * p, params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return step


def run(step, params, state, steps=2):
    for _ in range(steps):
        params, state = step(params, state, loss_of(params))
    return params, state


@pytest.fixture(scope="module")
def on_one_device():
    results = {}
    for name, make in MAKE.items():
        tx, params = make(), jax.tree.map(jnp.asarray, WHOLE)
        results[name] = run(jax.jit(step_of(tx)), params, tx.init(params))
    return results


def assert_close(actual, expected):
    """In the order of sums and products alone do they differ."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=2e-5, atol=2e-5)


def specs_of(state):
    """The specs of a state of WHOLE: by the names of its leaves."""
    return jax.tree.map_with_path(
        lambda path, leaf: SPECS.get(getattr(path[-1], "key", ""), P()), state
    )


# Explicit meshes


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, True) for name in MAKE),
        pytest.param("normuon", False, marks=pytest.mark.slow),
        pytest.param("prodigy", False, marks=pytest.mark.slow),
    ],
)
def test_an_explicit_mesh_gives_the_run_of_one_device(name, compiled, on_one_device):
    mesh = mesh_of(AxisType.Explicit)
    wrap = jax.jit if compiled else lambda f: f
    # Neither needs the mesh to be set, and it may be.
    with jax.set_mesh(mesh) if compiled else contextlib.nullcontext():
        tx, start = MAKE[name](), placed(mesh)
        state = wrap(tx.init)(start)
        result = run(wrap(step_of(tx)), start, state)
    assert_close(result, on_one_device[name])
    for before, after in zip(
        jax.tree.leaves((start, state)), jax.tree.leaves(result), strict=True
    ):
        # As a carry of scan, and what may be donated, want it.
        assert jax.typeof(before).sharding.spec == jax.typeof(after).sharding.spec


def test_numbers_that_lie_on_an_explicit_mesh_are_refused_by_their_cause():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        tx, params = optax.inject_hyperparams(MAKE["muon"])(0.02), placed(mesh)
        with pytest.raises(ValueError, match="give inject_hyperparams all"):
            jax.jit(tx.update)(params, tx.init(params), params)


# Muon and Prodigy in shard_map


def mapped(tx, spec, **options):
    """The first update of one matrix that is laid out by spec."""
    params = {"w": jnp.asarray(MATRIX)}
    state = tx.init(params)
    rows = P(*(None if axis == "data" else axis for axis in spec))
    of_state = jax.tree.map(
        lambda leaf: (
            spec if leaf.shape == MATRIX.shape else rows if leaf.ndim == 2 else P()
        ),
        state,
    )
    update = jax.shard_map(
        tx.update,
        mesh=mesh_of(),
        in_specs=({"w": spec}, of_state, {"w": spec}),
        out_specs=({"w": spec}, of_state),
        **options,
    )
    return jax.jit(update)(params, state, params)[0]["w"]


@pytest.mark.parametrize("name", ACROSS)
def test_a_part_of_a_leaf_is_refused_and_a_whole_one_is_not(name):
    tx = MAKE[name]()
    with pytest.raises(ValueError, match=r"differ along the mesh axes \['data'\]"):
        mapped(tx, P("data"))
    # Without check_vma a part looks like a whole.
    for spec in (P("data"), P()):
        with pytest.raises(ValueError, match="per_device=True"):
            mapped(tx, spec, check_vma=False)
    params = {"w": jnp.asarray(MATRIX)}
    expected = tx.update(params, tx.init(params), params)[0]["w"]
    assert_close(mapped(tx, P()), expected)
    assert_close(mapped(MAKE[name](per_device=True), P(), check_vma=False), expected)


@pytest.mark.parametrize("name", ACROSS)
def test_parts_in_pmap_are_refused(name):
    tx, params = MAKE[name](), {"w": jnp.asarray(MATRIX)}
    stacked = jax.tree.map(lambda p: jnp.stack([p] * 2), (params, tx.init(params)))
    with pytest.raises(ValueError, match="per_device=True"):
        jax.pmap(tx.update)(stacked[0], stacked[1], stacked[0])


def test_a_model_on_each_device_moves_as_if_alone():
    tx = sf_jax.schedule_free_muon(per_device=True)
    alone = sf_jax.schedule_free_muon()
    expected = [alone.update(p, alone.init(p), p)[0] for p in np.split(MATRIX, 4)]
    assert_close(mapped(tx, P("data")), np.concatenate(expected))


def test_the_rows_of_normuon_stay_with_their_matrix():
    """A mean of rows has size 1 where the matrix's axis may be sharded."""
    tx, start = MAKE["normuon"](), placed(mesh_of())
    state = jax.jit(tx.init)(start)
    rows = state.base_state.inner_states["muon"].inner_state[1].v["w"]
    assert rows.shape == (1, 16)
    assert rows.sharding.spec == P(None, "model")

    def init(matrix):
        box = nn.Partitioned(jnp.asarray(matrix), names=("data", "model"))
        return {"w": box}, tx.init({"w": box})

    specs = nn.get_partition_spec(jax.eval_shape(init, MATRIX))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh_of(), spec),
        specs,
        is_leaf=lambda node: isinstance(node, P),
    )
    # A spec of the whole matrix would not fit the rows here.
    params, state = jax.jit(init, out_shardings=shardings)(MATRIX)
    step = jax.jit(step_of(tx), out_shardings=shardings)
    params, _ = step(params, state, None)
    bare = {"w": jnp.asarray(MATRIX)}
    expected, _ = step_of(tx)(bare, tx.init(bare), None)
    assert_close(params, expected)


# ScheduleFree+ in shard_map


def mapped_plus(axis_name, local=False, **options):
    """A run of WHOLE in shard_map; local: each replica has a loss of its own."""
    tx = MAKE["plus"](axis_name=axis_name)
    params = jax.tree.map(jnp.asarray, WHOLE)
    state = tx.init(params)
    of_state, step = specs_of(state), step_of(tx)

    def one(params, state, loss):
        if local:  # of which the mean is loss
            loss += EACH * (jax.lax.axis_index("data") - 1.5)
        return step(params, state, loss)

    update = jax.shard_map(
        one,
        mesh=mesh_of(),
        in_specs=(SPECS, of_state, P()),
        out_specs=(SPECS, of_state),
        **options,
    )
    return run(jax.jit(update), params, state)


@pytest.mark.parametrize("local", [False, True], ids=["mean_loss", "local_loss"])
def test_the_sums_of_plus_run_over_all_parts_once(local, on_one_device):
    """w is in eight parts, u in two, and b on every device."""
    assert_close(mapped_plus(("data", "model"), local), on_one_device["plus"])


@pytest.mark.parametrize(
    ("axis_name", "options", "message"),
    [
        (None, {}, r"differ along the mesh axes \['data', 'model'\]"),
        ("model", {}, r"differ along the mesh axes \['data'\]"),
        (("data", "model"), {"check_vma": False}, "check_vma=False"),
        (None, {"check_vma": False}, "check_vma=False"),
        (("data", "modle"), {}, r"axis_name holds \['modle'\]"),
    ],
)
def test_sums_of_plus_over_a_part_are_refused(axis_name, options, message):
    with pytest.raises(ValueError, match=message):
        mapped_plus(axis_name, **options)


def replicas_of_plus(axis_name, loss):
    """x's distance between two of four replicas, and one step's move, in pmap."""
    tx = MAKE["plus"](axis_name=axis_name)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), WHOLE)
    state = jax.pmap(tx.init)(params)
    step = jax.pmap(
        lambda p, s, index: step_of(tx)(p, s, loss(1.0 + index)), axis_name="data"
    )
    params, _ = step(params, state, jnp.arange(4.0))
    return float(jnp.max(jnp.abs(params["w"] - params["w"][:1])))


def test_replicas_of_plus_do_not_part_unnoticed():
    with pytest.raises(ValueError, match=r"axis_name=\(\)"):
        replicas_of_plus(None, lambda loss: loss)
    assert replicas_of_plus((), partial(jax.lax.pmean, axis_name="data")) == 0


def test_a_loss_or_gradients_of_a_replica_are_refused():
    tx = MAKE["plus"]()
    params = jax.tree.map(jnp.asarray, WHOLE)
    for grads_differ, message in ((False, "the loss"), (True, "Pass their mean")):

        def one(p, s, differ=grads_differ):
            spread = jax.lax.axis_index("data") * 1.0
            grads = jax.tree.map(lambda g: g + spread, p) if differ else p
            value = 1.0 if differ else spread
            return tx.update(grads, s, p, value=value)[0]

        update = jax.shard_map(one, mesh=mesh_of(), in_specs=P(), out_specs=P("data"))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(update, params, tx.init(params))


@pytest.mark.parametrize("value", [3, ("data", None), {"data": 1}])
def test_an_axis_name_that_is_none_is_refused(value):
    with pytest.raises(TypeError, match="axis_name must be"):
        sf_jax.schedule_free_plus(axis_name=value)
