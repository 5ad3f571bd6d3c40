"""What a state holds, however it is made, and going on from one made otherwise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import PartitionSpec as P

import sf_jax
from parity_tests.registry import CASES
from sf_jax import _averaging, _schedule_free

# One row of the registry for each optimizer.
REGISTRY = {
    case.optimizer.name: partial(case.optimizer.jax, case.options)
    for case in reversed(CASES)
    if case.optimizer.jax is not None
}
# Every named optimizer with its numbers injected. static: what is no number.
INJECTED = {
    "sgd": (sf_jax.schedule_free_sgd, {"learning_rate": 0.1}),
    "adamw": (sf_jax.schedule_free_adamw, {"learning_rate": 0.1, "warmup_steps": 3}),
    "momentum": (sf_jax.schedule_free_adamw, {"inner_momentum": 0.9}),
    "radam": (sf_jax.schedule_free_radam, {}),
    "plus": (sf_jax.schedule_free_plus, {"weight_decay": 0.1}),
    "gpa": (sf_jax.gpa_adamw, {"upstream_compatible": True}),
    "prodigy": (sf_jax.schedule_free_prodigy, {}),
    "muon": (sf_jax.schedule_free_muon, {"consistent_rms": 0.2}),
    "normuon": (sf_jax.schedule_free_muon, {"row_b2": 0.95}),
    "wrapped": (sf_jax.schedule_free, {"base_optimizer": optax.rmsprop(0.1)}),
}
INJECTED["wrapped"][1]["learning_rate"] = 0.1
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "v": jnp.linspace(0.1, 1.0, 4)}


def injected(name, **options):
    factory, given = INJECTED[name]
    return optax.inject_hyperparams(factory)(**given, **options)


ALL = {name: partial(make, False) for name, make in REGISTRY.items()}
ALL |= {f"injected {name}": partial(injected, name) for name in INJECTED}


def gradients(params, step):
    return jax.tree.map(lambda p: jnp.cos(p + step).astype(p.dtype), params)


def step_of(tx):
    def step(params, state, k):
        grads = gradients(params, k)
        updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    return step


def described(state):
    """Structure, shapes and dtypes."""
    leaves = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    return jax.tree.structure(state), leaves


def inner(state):
    return getattr(state, "inner_state", state)


# One structure, however the state is made


@pytest.mark.parametrize("name", ALL)
def test_a_state_has_one_structure_however_it_is_made(name):
    tx = optax.with_extra_args_support(ALL[name]())
    eager = tx.init(PARAMS)
    expected = described(eager)
    assert described(jax.eval_shape(tx.init, PARAMS)) == expected  # as jit traces it
    assert described(nnx.eval_shape(tx.init, PARAMS)) == expected


@pytest.mark.parametrize("name", INJECTED)
def test_a_state_goes_through_branches_and_loops_and_bytes(name):
    tx = injected(name)
    eager = tx.init(PARAMS)
    expected = described(eager)
    step = step_of(tx)

    @jax.jit
    def steps(params, fresh):
        old = jax.lax.fori_loop(0, 2, lambda k, c: step(*c, k), (params, fresh))
        return jax.lax.cond(params["v"][0] < 9, lambda: old, lambda: (params, fresh))

    params, state = steps(PARAMS, eager)
    assert described(state) == expected
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))

    back = serialization.from_bytes(
        jax.eval_shape(tx.init, PARAMS), serialization.to_bytes(state)
    )
    assert jax.tree.structure(back) == expected[0]


@pytest.mark.parametrize("name", INJECTED)
def test_injected_numbers_lie_in_no_buffer_twice(name):
    arrays = [a for a in jax.tree.leaves(injected(name).init(PARAMS)) if a.size]
    assert len({a.unsafe_buffer_pointer() for a in arrays}) == len(arrays)


@pytest.mark.parametrize("name", ["adamw", "momentum", "plus"])
def test_orbax_restores_into_shapes_alone(name, tmp_path):
    tx = injected(name)
    _, state = step_of(tx)(PARAMS, tx.init(PARAMS), 0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_no_moment_is_kept_that_nobody_asked_for():
    for name, keeps in {"adamw": False, "momentum": True}.items():
        moments = inner(injected(name).init(PARAMS)).base_state
        assert bool(jax.tree.leaves(moments.mu)) == keeps
    plain = sf_jax.schedule_free_adamw(inner_momentum=0.0).init(PARAMS)
    assert not jax.tree.leaves(plain.base_state.mu)


# b1 = 0


@pytest.mark.parametrize("name", ["sgd", "adamw", "wrapped"])
def test_an_injected_b1_of_0_has_the_mean_of_z_for_its_x(name):
    tx = injected(name, b1=0.0, weight_lr_power=0.0)
    step = jax.jit(step_of(tx))
    params, state, zs = PARAMS, jax.jit(tx.init)(PARAMS), []
    for k, b1 in enumerate([0.0, 0.0, 0.9, 0.0]):
        state.hyperparams["b1"] = jnp.float32(b1)
        params, state = step(params, state, k)
        zs.append(inner(state).z)
        mean = jax.tree.map(lambda *z: sum(z) / len(z), *zs)
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, sf_jax.eval_params(state), mean)
        jax.tree.map(close, sf_jax.eval_params(state, params), mean)


@pytest.mark.parametrize("name", INJECTED)
def test_no_optimizer_turns_to_nan_at_an_injected_b1_of_0(name):
    beta = {"plus": "sf_beta1", "gpa": "mu_y"}.get(name, "b1")
    options = {beta: 0.0} | ({"weight_decay": 0.1} if name == "gpa" else {})
    tx = injected(name, **options)
    params, state = jax.lax.fori_loop(
        0, 3, lambda k, c: step_of(tx)(*c, k), (PARAMS, tx.init(PARAMS))
    )
    x = sf_jax.eval_params(state, params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, x)))
    # y is z.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), params, inner(state).z)


def test_a_schedule_of_b1_that_begins_at_0_needs_x():
    b1 = optax.linear_schedule(0.0, 0.9, 10)
    tx = sf_jax.schedule_free_sgd(0.1, b1=b1)
    for init in (tx.init, jax.jit(tx.init)):
        with pytest.raises(ValueError, match=r"β .*got 0 at count 0.*store_x=True"):
            init(PARAMS)
    sf_jax.schedule_free_sgd(0.1, b1=b1, store_x=True).init(PARAMS)
    plus = sf_jax.schedule_free_plus(sf_beta1=0.0, sf_beta1_anneal_steps=4)
    assert jax.tree.leaves(plus.init(PARAMS).x)


# Going on from a state that was made otherwise


def x_of_weights_alike(make_first, make_then, cast=None):
    """After three steps of each of two SGDs: x, and the mean of all z."""
    params = {"w": jnp.linspace(-1.0, 1.0, 6)}
    tx, zs = make_first(), []
    state = tx.init(params)
    for k in range(6):
        if k == 3:
            tx = make_then()
            params = cast(params) if cast else params
        updates, state = tx.update(gradients(params, k), state, params)
        params = optax.apply_updates(params, updates)
        zs.append(np.asarray(state.z["w"], np.float64))
    return sf_jax.eval_params(state, params)["w"], np.mean(zs, axis=0)


sgd = partial(sf_jax.schedule_free_sgd, 0.1)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"b1": 0.9}, {"b1": 0.5}),
        ({"b1": 0.5}, {"b1": 0.98}),
        ({"b1": 0.9}, {"b1": optax.linear_schedule(0.3, 0.9, 5)}),
        ({"b1": 0.9, "store_x": True}, {"b1": 0.5}),
        ({"b1": 0.9}, {"b1": 0.5, "store_x": True}),
        ({"b1": 0.0}, {"b1": 0.9}),
        ({"b1": 0.9, "store_x": True}, {"b1": 0.0}),
        ({"state_dtype": jnp.float32}, {"state_dtype": jnp.bfloat16}),
    ],
    ids=[
        "less",
        "more",
        "to a schedule",
        "from stored x",
        "to stored x",
        "from 0",
        "to 0",
        "to a narrow z",
    ],
)
def test_x_is_the_mean_of_z_whatever_made_the_state(first, then):
    x, mean = x_of_weights_alike(partial(sgd, **first), partial(sgd, **then))
    np.testing.assert_allclose(x, mean, rtol=3e-6, atol=3e-7)


def test_params_may_become_wider():
    first = partial(sgd, b1=0.9)

    def narrow_first():
        tx = first()
        return optax.GradientTransformation(
            lambda p: tx.init(jax.tree.map(lambda p: p.astype(jnp.bfloat16), p)),
            tx.update,
        )

    x, mean = x_of_weights_alike(narrow_first, partial(sgd, b1=0.5))
    np.testing.assert_allclose(x, mean, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 1.0])
def test_a_constant_b1_leaves_the_coefficients_to_the_last_bit(b1):
    ckp1 = jnp.asarray(np.random.default_rng(0).random(1000), jnp.float32)
    state_b1 = jnp.float32(b1)
    if b1:
        of_z, _ = _schedule_free._lean_coefficients(ckp1, b1, state_b1)
        np.testing.assert_array_equal(of_z, ckp1)
    assert jnp.asarray(b1, _averaging.scalar_dtype()) == state_b1


MADE_OTHERWISE = {
    "momentum turned on": (
        sf_jax.schedule_free_adamw(),
        sf_jax.schedule_free_adamw(inner_momentum=0.9),
        r"base_state\.mu\['v'\] is missing.*inner_momentum.*init\(",
    ),
    "momentum turned off": (
        sf_jax.schedule_free_adamw(inner_momentum=0.9),
        sf_jax.schedule_free_adamw(),
        r"base_state\.mu\['v'\] is there and should not be",
    ),
    "sgd to adamw": (sgd(), sf_jax.schedule_free_adamw(), r"base_state\.nu.*missing"),
    "adamw to sgd": (
        sf_jax.schedule_free_adamw(),
        sgd(),
        r"base_state\.nu\['v'\] is there.*\(and 1 more\)",
    ),
    "gpa to plus": (
        sf_jax.gpa_adamw(),
        sf_jax.schedule_free_plus(),
        r"step_size_state\.grad_l1 is missing",
    ),
    "muon to prodigy": (
        sf_jax.schedule_free_muon(),
        sf_jax.schedule_free_prodigy(),
        "does not fit this optimizer",
    ),
    "optax to ours": (optax.adam(0.1), sgd(), r"needs a ScheduleFreeState.*tuple"),
    "lean to b1 = 0": (sgd(), sgd(b1=0.0), r"does not hold x.*state\._replace"),
    "lean to an array": (sgd(), sgd(b1=jnp.float32(0.5)), r"does not hold x"),
}


@pytest.mark.parametrize("pair", MADE_OTHERWISE)
def test_a_state_that_cannot_be_gone_on_from_is_refused(pair):
    first, then, message = MADE_OTHERWISE[pair]
    state = first.init(PARAMS)
    for update in (then.update, jax.jit(then.update)):
        with pytest.raises(ValueError, match=message):
            update(PARAMS, state, PARAMS)


def test_params_of_other_shapes_are_refused():
    tx = sgd()
    params = {**PARAMS, "v": jnp.ones(5)}
    with pytest.raises(ValueError, match=r"z\['v'\] has shape \(4,\) for \(5,\)"):
        tx.update(params, tx.init(PARAMS), params)


def test_params_may_become_narrower_once_x_is_stored():
    tx = sgd(b1=0.9)
    params, state = PARAMS, tx.init(PARAMS)
    for k in range(3):
        updates, state = tx.update(gradients(params, k), state, params)
        params = optax.apply_updates(params, updates)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match=r"params\['v'\] is bfloat16.*_replace"):
        tx.update(half, state, half)
    x = sf_jax.eval_params(state, params)
    # A step without gradient: z stays, and x goes a quarter of the way to it.
    none = jax.tree.map(jnp.zeros_like, half)
    _, after = tx.update(none, state._replace(x=x), half)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        after.x,
        jax.tree.map(lambda x, z: x + (z - x) / 4, x, state.z),
    )


def test_what_the_error_says_to_do_works():
    first = sgd(b1=0.9)
    updates, state = first.update(PARAMS, first.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    state = state._replace(x=sf_jax.eval_params(state, params))
    _, state = sgd(b1=0.0).update(PARAMS, state, params)
    sf_jax.eval_params(state)


# optax.tree_map_params


def specs_of(tx, params, **options):
    specs = {"w": P("a", None), "v": P("a")}
    return optax.tree_map_params(
        tx,
        lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
        tx.init(params),
        specs,
        transform_non_params=lambda _: P(),
        **options,
    )


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_specs_map_onto_every_state(name, dtype):
    half = dtype == jnp.bfloat16
    tx = REGISTRY[name](half)  # store_x, without which optax cannot know of it
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    # Muon is an optax.partition, which needs this in optax too.
    masked = {"is_leaf": lambda n: isinstance(n, optax.MaskedNode)}
    specs = specs_of(tx, params, **(masked if "muon" in name else {}))
    state = tx.init(params)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    jax.tree.map(
        lambda leaf, spec: len(spec) <= leaf.ndim or pytest.fail(str((leaf, spec))),
        state,
        specs,
    )
    assert specs.z == {"w": P("a", None), "v": P("a")}
    assert specs.x == (specs.z if half else optax.MaskedNode())
    assert specs.count == specs.b1 == P()


@pytest.mark.parametrize("name", ALL)
def test_placeholders_give_a_state(name):
    """What optax.tree_map_params calls init with is a tree without leaves."""
    tx = ALL[name]()
    doubled = optax.tree_map_params(tx, lambda leaf: 2 * leaf, tx.init(PARAMS))
    jax.tree.map(
        lambda two, one: np.testing.assert_array_equal(two, 2 * one),
        inner(doubled).z,
        inner(tx.init(PARAMS)).z,
    )


def test_specs_map_onto_a_tree_of_two_dtypes_where_x_is_stored():
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "v": PARAMS["v"]}
    with pytest.raises(ValueError, match=r"different types"):
        specs_of(sgd(), params)
    specs = specs_of(sgd(store_x=True), params)
    assert specs.x == specs.z == {"w": P("a", None), "v": P("a")}


# The dtypes of z and of the moments

MOMENTS = {
    "adamw": (sf_jax.schedule_free_adamw, {"inner_momentum": 0.9}),
    "radam": (sf_jax.schedule_free_radam, {}),
    "plus": (sf_jax.schedule_free_plus, {}),
    "gpa": (sf_jax.gpa_adamw, {}),
    "prodigy": (sf_jax.schedule_free_prodigy, {}),
    "muon": (sf_jax.schedule_free_muon, {}),
    "normuon": (sf_jax.schedule_free_muon, {"row_b2": 0.95}),
}
_MOMENT_NAMES = ("nu", "mu", "v", "exp_avg", "exp_avg_sq")


def moments(state):
    return [
        leaf
        for path, leaf in jax.tree.leaves_with_path(state.base_state)
        if any(getattr(entry, "name", "") in _MOMENT_NAMES for entry in path)
    ]


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize(
    ("options", "of_z", "of_moments"),
    [
        ({}, jnp.float32, jnp.float32),
        ({"state_dtype": jnp.bfloat16}, jnp.bfloat16, jnp.float32),
        ({"moment_dtype": jnp.bfloat16}, jnp.float32, jnp.bfloat16),
        ({"state_dtype": jnp.complex64}, jnp.float32, jnp.float32),
    ],
    ids=["default", "narrow z", "narrow moments", "complex z"],
)
def test_moments_are_float32_unless_asked(name, options, of_z, of_moments):
    factory, given = MOMENTS[name]
    tx = factory(**given, **options)
    state = tx.init(PARAMS)
    expected = described(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.z)} == {jnp.dtype(of_z)}
    assert {leaf.dtype for leaf in moments(state)} == {jnp.dtype(of_moments)}
    _, state = jax.eval_shape(step_of(tx), PARAMS, state, 0)
    assert described(state) == expected


@pytest.mark.parametrize("name", ["adamw", "radam", "plus", "gpa"])
def test_complex_moments_keep_their_kind(name):
    factory, given = MOMENTS[name]
    params = {"w": jnp.ones(3, jnp.complex64)}
    tx = factory(**given, moment_dtype=jnp.float32, state_dtype=jnp.float32)
    state = tx.init(params)
    assert state.z["w"].dtype == jnp.complex64
    assert state.base_state.nu["w"].dtype == jnp.float32


def test_the_second_moment_of_a_narrow_z_does_not_stand_still():
    """v after so many unit gradients is 1 - b2^k, in bfloat16 it would stop short."""
    tx = sf_jax.schedule_free_adamw(1e-3, state_dtype=jnp.bfloat16)
    params = {"w": jnp.ones(2)}
    step = lambda k, c: (c[0], tx.update(params, c[1], c[0])[1])  # noqa: E731
    _, state = jax.lax.fori_loop(0, 1000, step, (params, tx.init(params)))
    np.testing.assert_allclose(state.base_state.nu["w"], 1 - 0.999**1000, rtol=1e-5)


def test_the_base_under_a_narrow_z_computes_in_float32():
    tx = sf_jax.schedule_free(optax.adam(1e-3), 1e-3, state_dtype=jnp.bfloat16)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    # 1 + 2^-12 is no bfloat16: neither gradient nor moment may be rounded to it.
    grads = {"w": jnp.full(2, 1 + 2.0**-12)}
    _, state = tx.update(grads, state, params)
    (adam, _) = state.base_state
    np.testing.assert_allclose(adam.mu["w"], 0.1 * (1 + 2.0**-12), rtol=1e-6)
    assert state.z["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["moment_dtype", "state_dtype"])
@pytest.mark.parametrize("optimizer", MOMENTS)
def test_dtypes_that_are_not_floating_are_refused(optimizer, name):
    with pytest.raises(
        ValueError, match=f"{name} must be None or a floating dtype.*int8"
    ):
        MOMENTS[optimizer][0](**{name: jnp.int8})
