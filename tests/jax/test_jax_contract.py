"""What an optax user may rely on: dtypes, compilation, donation, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sf_jax


def with_loss(make, **options):
    """An optimizer that needs the loss, always given the same."""
    tx = make(**options)
    return optax.GradientTransformation(tx.init, partial(tx.update, value=0.7))


OPTIMIZERS = {
    "sgd": partial(sf_jax.schedule_free_sgd, 0.1, warmup_steps=3),
    "adamw": partial(sf_jax.schedule_free_adamw, 0.01, warmup_steps=3),
    "adamw_momentum": partial(sf_jax.schedule_free_adamw, 0.01, inner_momentum=0.9),
    "adamw_paper": partial(sf_jax.schedule_free_adamw, 0.01, variant="paper"),
    "adamw_algoperf": partial(
        sf_jax.schedule_free_adamw, 0.01, variant="algoperf", weight_decay=0.1
    ),
    "radam": partial(sf_jax.schedule_free_radam, 0.01),
    "plus": partial(with_loss, sf_jax.schedule_free_plus, weight_decay=1.0),
    "gpa": partial(sf_jax.gpa_adamw, 0.01, weight_decay=0.1, upstream_compatible=True),
    "prodigy": sf_jax.schedule_free_prodigy,
    # optax's other scale divides by the size of an empty leaf.
    "muon": partial(sf_jax.schedule_free_muon, 0.01, consistent_rms=0.2),
    "normuon": partial(sf_jax.schedule_free_muon, 0.01, row_b2=0.95),
    "wrapped": partial(sf_jax.schedule_free, optax.adamw(0.01, b1=0.0), 0.01),
}
PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "scalar": jnp.float32(0.5),
    "empty": jnp.zeros((0, 3)),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def gradients(params, step):
    return jax.tree.map(lambda p: jnp.cos(p + step).astype(p.dtype), params)


def train(tx, params=PARAMS, steps=5):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("store_x", [False, True])
def test_dtypes_and_structure_are_kept(make, dtype, store_x):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = make(store_x=store_x)
    start = tx.init(params)
    updates, state = jax.eval_shape(tx.update, gradients(params, 0), start, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert dtypes(updates) == dtypes(params)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    assert dtypes(state) == dtypes(start)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((start, state)))


def test_a_step_compiles_once(make):
    tx, traces = make(), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(gradients(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_params_and_state_can_be_donated(make):
    tx = make()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(gradients(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    donated = params["w"], state.z["w"]
    for _ in range(2):
        params, state = step(params, state)
    assert all(leaf.is_deleted() for leaf in donated)
    expected, _ = train(
        optax.GradientTransformation(
            tx.init, lambda g, s, p: tx.update(gradients(p, 0), s, p)
        ),
        steps=2,
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), params, expected)


def test_injected_hyperparameters_can_be_donated():
    """No buffer lies in the state twice, though β is in it in two places."""
    tx = optax.inject_hyperparams(sf_jax.schedule_free_sgd)(0.1, b1=0.9)
    arrays = [leaf for leaf in jax.tree.leaves(tx.init(PARAMS)) if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in arrays}) == len(arrays)


def test_multi_steps_promotes_nothing(make):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optax.MultiSteps(make(), every_k_schedule=2)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(4):
        before = dtypes(state)
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        assert dtypes(state) == before
        assert set(dtypes(updates)) == {jnp.dtype(jnp.bfloat16)}
    assert sf_jax.eval_params(state)["w"].dtype == jnp.float32
    assert sf_jax.eval_params(state, params)["w"].dtype == jnp.bfloat16


def test_eager_and_jit_and_scan_agree(make):
    tx = make()
    jitted, _ = train(tx)
    eager, state = PARAMS, tx.init(PARAMS)
    for step in range(5):
        updates, state = tx.update(gradients(eager, step), state, eager)
        eager = optax.apply_updates(eager, updates)

    def body(carry, step):
        params, state = carry
        updates, state = tx.update(gradients(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), jnp.arange(5))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, eager, jitted)
    jax.tree.map(close, scanned, jitted)


def test_tree_map_params_reaches_z(make):
    """optax's own way to place or inspect state, here to count its arrays."""
    tx = make()
    state = tx.init(PARAMS)
    doubled = optax.tree_utils.tree_map_params(tx, lambda leaf: 2 * leaf, state)
    np.testing.assert_array_equal(doubled.z["w"], 2 * state.z["w"])
    assert doubled.count == state.count


# Bytes a parameter, the parameter itself not counted: z, then moments, then x.
MEMORY = [
    ("sgd", jnp.float32, {}, 4),
    ("sgd", jnp.float32, {"store_x": True}, 4 + 4),
    ("sgd", jnp.float32, {"b1": 0.0}, 4 + 4),
    ("sgd", jnp.bfloat16, {}, 4 + 4),
    ("sgd", jnp.bfloat16, {"state_dtype": jnp.bfloat16}, 2),
    ("adamw", jnp.float32, {}, 4 + 4),
    ("adamw", jnp.bfloat16, {}, 4 + 4 + 4),
    ("adamw", jnp.float16, {}, 4 + 4 + 4),
    ("adamw", jnp.float32, {"store_x": True}, 4 + 4 + 4),
    ("adamw_momentum", jnp.float32, {}, 4 + 4 + 4),
    ("radam", jnp.float32, {}, 4 + 4),
    ("plus", jnp.float32, {}, 4 + 4 + 4),
    ("plus", jnp.bfloat16, {}, 4 + 4 + 4 + 4),
]


@pytest.mark.parametrize(("name", "dtype", "options", "expected"), MEMORY)
def test_memory_is_as_the_design_says(name, dtype, options, expected):
    size = 1000
    state = jax.eval_shape(
        OPTIMIZERS[name](**options).init, jax.ShapeDtypeStruct((size,), dtype)
    )
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) == expected * size


def test_each_leaf_keeps_state_by_its_own_dtype():
    params = {"half": jnp.ones(3, jnp.bfloat16), "full": jnp.ones(3)}
    state = sf_jax.schedule_free_adamw().init(params)
    assert isinstance(state.x["full"], optax.MaskedNode)
    assert state.x["half"].dtype == jnp.float32


def test_a_mask_keeps_leaves_from_decay():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    for mask in ({"w": True, "b": False}, lambda p: {"w": True, "b": False}):
        for make in (sf_jax.schedule_free_sgd, sf_jax.schedule_free_adamw):
            tx = make(0.1, weight_decay=0.5, mask=mask)
            updates, _ = tx.update(zero, tx.init(params), params)
            np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
            np.testing.assert_array_equal(updates["b"], 0)


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda g: -factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = sf_jax.schedule_free(base, 1.0)
    params = jnp.ones(2)
    updates, _ = tx.update(params, tx.init(params), params, factor=0.25)
    np.testing.assert_allclose(updates, -0.25)


WITH_AVERAGE = [
    partial(sf_jax.schedule_free, optax.sgd(0.1), 0.1),
    sf_jax.schedule_free_sgd,
    sf_jax.schedule_free_adamw,
    sf_jax.schedule_free_radam,
    sf_jax.schedule_free_muon,
    sf_jax.schedule_free_prodigy,
]


def test_another_average():
    """c = 1 - μ constant, as in the primal averaging of GPA."""
    tx = sf_jax.schedule_free(
        optax.sgd(0.1), 0.1, average=lambda count, lr, b1, ckp1: 0.25
    )
    x = z = params = jnp.ones(2)
    state = tx.init(params)
    for step in range(4):
        grads = gradients(params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        z = z - 0.1 * grads
        x = 0.75 * x + 0.25 * z
    np.testing.assert_allclose(sf_jax.eval_params(state, params), x, rtol=1e-6)


def test_an_average_of_ones_own_gets_plain_scalars():
    """It sees what the step is made of, and c is what it returns."""
    seen, b1 = [], lambda count: 0.9 - 0.1 / (count + 1)

    def average(*scalars):
        seen.append([float(scalar) for scalar in scalars])
        return scalars[-1] / 2

    tx = sf_jax.schedule_free_sgd(
        optax.linear_schedule(0.1, 0.3, 2), 2, b1, r=1.0, average=average
    )
    x = z = params = jnp.ones(2)
    state, total = tx.init(params), 0.0
    # lr_k with the warmup, and the weights (k + 1) lr_k^2.
    for step, lr in enumerate([0.05, 0.2, 0.3]):
        grads = gradients(params, step)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        weight = (step + 1) * lr**2
        total += weight
        expected = [step, lr, b1(step), weight / total]
        assert seen[-1] == pytest.approx(expected, rel=1e-6)
        z = z - lr * grads
        x = x + weight / total / 2 * (z - x)
    np.testing.assert_allclose(sf_jax.eval_params(state, params), x, rtol=1e-5)


@pytest.mark.parametrize("powers", [{"r": 0.5}, {"weight_lr_power": 1.0}])
@pytest.mark.parametrize("make", WITH_AVERAGE)
def test_powers_beside_an_average_without_weights_are_refused(make, powers):
    (name, value), average = *powers.items(), sf_jax.exponential_average(0.9)
    with pytest.raises(ValueError, match=f"{name} = {value} has no meaning.*Leave"):
        make(average=average, **powers)


@pytest.mark.parametrize("decay_at", [None, "x", "y", "z"])
def test_algoperf_decays_where_it_is_told(decay_at):
    """Without a gradient only the decay moves z: by lr sqrt(1 - b2^k) λ p."""
    tx = sf_jax.schedule_free_adamw(
        0.5, b2=0.75, weight_decay=0.5, variant="algoperf", decay_at=decay_at
    )
    state = tx.init(jnp.float32(1))._replace(z=jnp.float32(3), b1=jnp.float32(0.5))
    # With y = 1 and β = 1/2, x = 2 y - z.
    p = {"x": -1.0, "y": 1.0, "z": 3.0}[decay_at or "x"]
    _, state = tx.update(jnp.float32(0), state, jnp.float32(1))
    assert state.z == pytest.approx(3 - 0.5 * 0.5 * 0.5 * p, rel=1e-6)


BAD_ARGUMENTS = [
    ({"b1": 1.2}, ValueError, r"b1 must be a number in \[0, 1\].*got 1.2"),
    ({"b1": -0.1}, ValueError, "b1.*got -0.1"),
    ({"learning_rate": -1.0}, ValueError, "learning_rate.*got -1.0"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate.*got nan"),
    ({"weight_decay": -0.5}, ValueError, "weight_decay.*got -0.5"),
    ({"eps": -1e-8}, ValueError, "eps.*got -1e-08"),
    ({"b2": 1.0}, ValueError, r"b2 must be a number in \[0, 1\).*got 1.0"),
    ({"inner_momentum": 1.5}, ValueError, "inner_momentum.*got 1.5"),
    ({"warmup_steps": -3}, ValueError, "warmup_steps.*got -3"),
    (
        {"warmup_steps": 2.5},
        TypeError,
        r"warmup_steps must be None or a whole number.*got 2\.5",
    ),
    ({"decay_at": "w"}, ValueError, "'y', 'z', 'x', got 'w'"),
    ({"variant": "fast"}, ValueError, "variant.*got 'fast'"),
    ({"state_dtype": jnp.int32}, ValueError, "state_dtype.*int32"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        sf_jax.schedule_free_adamw(**options)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (sf_jax.schedule_free_sgd, {"weight_decay": -1}, "weight_decay"),
        (sf_jax.schedule_free_sgd, {"decay_at": "u"}, "decay_at"),
        (sf_jax.schedule_free_radam, {"b2": -0.1}, "b2"),
        (sf_jax.schedule_free_radam, {"eps": -1.0}, "eps"),
        (
            partial(sf_jax.schedule_free, optax.sgd(0.1)),
            {"learning_rate": -0.1},
            "learning_rate",
        ),
    ],
)
def test_every_optimizer_checks_its_arguments(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)


def test_update_without_params_is_refused(make):
    tx = make()
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_gradients_of_another_structure_are_refused(make):
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"missing \[\"\['w'\]\"\]"):
        tx.update({k: v for k, v in PARAMS.items() if k != "w"}, state, PARAMS)


def test_gradients_of_another_shape_are_refused(make):
    tx = make()
    grads = {**PARAMS, "w": jnp.zeros((3, 2))}
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(3, 2\)"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


def test_integer_leaves_are_refused(make):
    with pytest.raises(ValueError, match=r"\['i'\] has dtype int32"):
        make().init({"i": jnp.arange(3)})
