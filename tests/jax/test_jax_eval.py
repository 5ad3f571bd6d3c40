"""eval_params finds x wherever the Schedule-Free state lies, and changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import sf_jax

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.array([0.5, -0.5])}
STEPS = 6


def sgd(**options):
    return sf_jax.schedule_free_sgd(0.1, warmup_steps=3, **options)


def injected(static_args=(), **options):
    """With every number but the static ones as a hyperparameter in the state."""
    factory = optax.inject_hyperparams(sf_jax.schedule_free_sgd, static_args)
    return factory(0.1, warmup_steps=3, **options)


def labels(params):
    return {"w": "free", "b": "other"}


# Each is equal to plain sgd(), or to it on the leaf w alone.
WRAPPED = {
    "plain": (sgd(), "all"),
    "chain": (optax.chain(optax.identity(), sgd()), "all"),
    "inject_learning_rate": (injected(("b1", "warmup_steps")), "all"),
    "inject_b1": (injected(("learning_rate",)), "all"),
    "inject_all": (injected(), "all"),
    "multi_steps": (optax.MultiSteps(sgd(), 1), "all"),
    "apply_if_finite": (optax.apply_if_finite(sgd(), 3), "all"),
    "masked": (optax.masked(sgd(), {"w": True, "b": False}), "w"),
    "partition": (
        optax.partition({"free": sgd(), "other": optax.sgd(0.3)}, labels),
        "w",
    ),
    "two_owners": (optax.partition({"free": sgd(), "other": sgd()}, labels), "all"),
    "nested": (
        optax.chain(
            optax.identity(),
            optax.MultiSteps(
                optax.apply_if_finite(injected(), 3), 1
            ).gradient_transformation(),
        ),
        "all",
    ),
    "stored": (sgd(store_x=True), "all"),
    "flatten": (optax.flatten(sgd()), "all"),
    "flatten_inside": (
        optax.chain(optax.identity(), optax.flatten(injected(("b1",)))),
        "all",
    ),
    "flatten_stored": (optax.flatten(sgd(store_x=True)), "all"),
}


def gradients(params, step):
    return jax.tree.map(lambda p: jnp.cos(p + step), params)


def train(tx, params=PARAMS, steps=STEPS):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.fixture(scope="module")
def expected():
    params, state = train(sgd())
    return sf_jax.eval_params(state, params)


@pytest.fixture(params=WRAPPED)
def trained(request, expected):
    """(params, state, expected x): leaves that nothing owns are expected at y."""
    tx, owned = WRAPPED[request.param]
    params, state = train(tx)
    x = expected if owned == "all" else {"w": expected["w"], "b": params["b"]}
    return params, state, x


def assert_close(actual, wanted, ulps=4):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == w.dtype
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=0, atol=ulps * 2**-23)


def test_x_is_found_inside(trained):
    params, state, x = trained
    assert_close(sf_jax.eval_params(state, params), x)


def test_x_is_found_under_jit(trained):
    params, state, x = trained
    assert_close(jax.jit(sf_jax.eval_params)(state, params), x)


def test_x_of_a_train_state(trained):
    params, state, x = trained
    train_state = TrainState(
        step=0, apply_fn=lambda: None, params=params, tx=None, opt_state=state
    )
    assert_close(sf_jax.eval_params(train_state), x)
    assert_close(sf_jax.eval_params({"params": params, "opt_state": state}), x)


def test_x_of_a_plain_dict_restore(trained):
    params, state, x = trained
    restored = serialization.msgpack_restore(
        serialization.to_bytes({"params": params, "opt_state": state})
    )
    assert type(restored["opt_state"]) is dict
    assert_close(
        jax.tree.map(jnp.asarray, sf_jax.eval_params(restored)),
        x,
    )


def test_inputs_are_left_alone(trained):
    params, state, _ = trained
    before = jax.tree.map(np.array, (params, state))
    sf_jax.eval_params(state, params)
    sf_jax.train_params(state, params)
    jax.tree.map(np.testing.assert_array_equal, before, (params, state))


def test_train_params_is_the_way_back(trained):
    params, state, _ = trained
    x = sf_jax.eval_params(state, params)
    assert_close(sf_jax.train_params(state, x), params, ulps=1)


def test_x_survives_the_donation_of_the_state():
    _, state = train(sgd(store_x=True))
    x = sf_jax.eval_params(state)
    copy = jax.tree.map(np.array, x)
    jax.jit(lambda s: jax.tree.map(jnp.negative, s), donate_argnums=0)(state)
    jax.tree.map(np.testing.assert_array_equal, x, copy)


def test_stored_x_needs_no_params(expected):
    _, state = train(optax.chain(optax.identity(), sgd(store_x=True)))
    assert_close(sf_jax.eval_params(state), expected)


def test_stored_x_of_two_owners_needs_no_params(expected):
    stored = sgd(store_x=True)
    _, state = train(optax.partition({"free": stored, "other": stored}, labels))
    assert_close(sf_jax.eval_params(state), expected)


def test_vmap_over_runs():
    starts = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    batch = jax.vmap(lambda params: sf_jax.eval_params(*reversed(train(sgd(), params))))
    xs = batch(starts)
    for run in range(2):
        params, state = train(sgd(), jax.tree.map(lambda p, r=run: p[r], starts))
        assert_close(
            jax.tree.map(lambda leaf, r=run: leaf[r], xs),
            sf_jax.eval_params(state, params),
        )


def test_a_batch_of_states_outside_vmap_is_refused():
    tx = sgd()
    starts = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    states = jax.vmap(tx.init)(starts)
    with pytest.raises(ValueError, match="vmap"):
        sf_jax.eval_params(states, starts)
    assert_close(jax.vmap(sf_jax.eval_params)(states, starts), starts)


def test_scan(expected):
    tx = sgd()

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), sf_jax.eval_params(state, params)

    start = (PARAMS, tx.init(PARAMS))
    _, xs = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(STEPS)))(start)
    assert_close(jax.tree.map(lambda leaf: leaf[-1], xs), expected)


def test_injected_b1_may_change_between_steps():
    """x stays the average of z, whatever the user does to β on the way."""
    tx = injected(weight_lr_power=0.0)
    params, state = PARAMS, tx.init(PARAMS)
    zs = []
    for step, b1 in enumerate([0.9, 0.9, 0.5, 0.98, 0.7]):
        state.hyperparams["b1"] = jnp.asarray(b1)
        updates, state = tx.update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
        zs.append(state.inner_state.z)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *zs)
        assert_close(sf_jax.eval_params(state, params), mean)


def test_leaves_are_matched_by_name_not_by_container():
    """A restored state holds dicts where the params still hold tuples."""
    params, state = train(sgd(), (PARAMS["w"], PARAMS["b"]))
    restored = serialization.to_state_dict(state)
    assert_close(
        sf_jax.eval_params(restored, params), sf_jax.eval_params(state, params)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_under_flatten_x_has_the_shapes_and_dtypes_of_params(dtype):
    params, state = train(optax.flatten(sgd()), jax.tree.map(dtype, PARAMS))
    x = jax.jit(sf_jax.eval_params)(state, params)
    assert jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("flatten", [optax.flatten, lambda tx: tx])
def test_mixed_dtypes_under_flatten_keep_theirs_and_need_stored_x(flatten):
    """The vector is float32, so bfloat16 leaves in it have no float32 master copy.

    Stored, x and z do not depend on what rounding leaves of y.
    """
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}
    tx = flatten(sgd(store_x=True))
    start = jax.tree.map(lambda p: np.asarray(p, np.float32), params)
    state = tx.init(params)
    for _ in range(STEPS):
        # Too small a step for bfloat16 to see.
        grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    x = sf_jax.eval_params(state, params)
    assert jax.tree.map(jnp.result_type, x) == jax.tree.map(jnp.result_type, params)
    (found,) = sf_jax._eval.find_states(state)
    assert (ravel_pytree(found.x)[0] < ravel_pytree(start)[0]).all()


@pytest.mark.parametrize(
    ("state", "params", "message"),
    [
        (optax.sgd(0.1).init(PARAMS), PARAMS, "no Schedule-Free state found"),
        (sgd().init(PARAMS), None, "Pass the live parameters"),
        (
            optax.masked(sgd(store_x=True), {"w": True, "b": False}).init(PARAMS),
            None,
            "owns the leaf.*'b'",
        ),
        (sgd().init(PARAMS), {"w": PARAMS["w"]}, "no leaf params.*'b'"),
        (
            sgd().init(PARAMS),
            {**PARAMS, "b": jnp.zeros(3)},
            r"shape \(3,\) in params and \(2,\)",
        ),
        (
            optax.chain(sgd(), sgd()).init(PARAMS),
            PARAMS,
            "two Schedule-Free states own",
        ),
        (
            optax.masked(optax.flatten(sgd()), {"w": True, "b": False}).init(PARAMS),
            PARAMS,
            "one array of shape .6,., and params have 8 elements",
        ),
    ],
    ids=["none", "no_params", "unowned", "missing_leaf", "shape", "two", "part"],
)
def test_what_cannot_be_answered_is_refused(state, params, message):
    with pytest.raises(ValueError, match=message):
        sf_jax.eval_params(state, params)


def test_train_params_needs_x():
    with pytest.raises(ValueError, match="train_params needs params"):
        sf_jax.train_params(sgd().init(PARAMS), None)


def test_an_empty_tree_has_an_empty_x():
    tx = sgd()
    assert sf_jax.eval_params(tx.init({}), {}) == {}
