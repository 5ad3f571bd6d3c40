"""What the members of the family promise beyond following other implementations."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sf_jax

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=8), jnp.float32),
}
TARGET = jax.tree.map(lambda p: 0.5 * jnp.cos(7 * p), PARAMS)
close = partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)


def loss(params, step):
    """A bowl whose slope is noisy, also at the bottom, so that no step size is free."""
    noise = jnp.sin((step + 1) * jnp.arange(1.0, 9.0))

    def of_leaf(p, target):
        return jnp.sum((p - target) ** 2 + 0.3 * noise * p)

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, params, TARGET))) + 5.0


def train(tx, params=PARAMS, steps=60):
    """y, x and z after each step."""

    def step(carry, count):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, count)
        updates, state = tx.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, sf_jax.eval_params(state, params), state.z)

    run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), jnp.arange(steps)))
    return run(params, tx.init(params))[1]


# One optimizer, two ways

PLAIN = {
    "sgd": partial(sf_jax.schedule_free_sgd, 0.1),
    "adamw": partial(sf_jax.schedule_free_adamw, 0.02, weight_decay=0.1),
    "radam": partial(sf_jax.schedule_free_radam, 0.02),
    "wrapper": partial(sf_jax.schedule_free, optax.rmsprop(0.01), 0.01),
}


@pytest.mark.parametrize("name", PLAIN)
def test_refined_with_c_of_one_over_one_minus_beta_is_plain(name):
    make = PLAIN[name]
    refined = make(b1=0.9, average=sf_jax.refined_average(10.0))
    jax.tree.map(close, train(refined), train(make(b1=0.9)))


@pytest.mark.parametrize("name", PLAIN)
def test_exponential_average_with_the_mu_of_a_mean_is_plain(name):
    """Where the step size is constant, so that all steps weigh alike."""
    mean = sf_jax.exponential_average(lambda count: 1 - 1 / (count + 1.0))
    # RAdam's step size grows; its steps are to weigh alike too.
    plain = PLAIN[name](weight_lr_power=0.0) if name == "radam" else PLAIN[name]()
    jax.tree.map(close, train(PLAIN[name](average=mean)), train(plain))


def test_gpa_with_the_coefficients_of_schedule_free_is_schedule_free():
    options = {"eps": 1e-8, "b2": 0.99, "weight_decay": 0.1, "decay_at": "z"}
    gpa = sf_jax.gpa_adamw(
        0.02, mu_y=0.9, mu_x=lambda count: 1 - 1 / (count + 1.0), **options
    )
    plain = sf_jax.schedule_free_adamw(0.02, b1=0.9, inner_momentum=0.9, **options)
    jax.tree.map(close, train(gpa), train(plain))


@pytest.mark.parametrize("decay_at", ["z", "y"])
def test_gpa_upstream_is_one_whether_x_is_stored_or_not(decay_at):
    make = partial(
        sf_jax.gpa_adamw,
        0.02,
        weight_decay=0.5,
        decay_at=decay_at,
        mask={"w": True, "b": False},
        upstream_compatible=True,
    )
    lean, stored = train(make()), train(make(store_x=True))
    jax.tree.map(close, lean, stored)
    ours = train(make(upstream_compatible=False))
    assert not np.allclose(lean[1]["w"], ours[1]["w"], rtol=1e-3)
    jax.tree.map(close, lean[1]["b"], ours[1]["b"])


def test_refined_is_capped_at_z():
    tx = sf_jax.schedule_free_sgd(0.1, average=sf_jax.refined_average(1e6))
    _, x, z = train(tx, steps=5)
    jax.tree.map(close, x, z)


# ScheduleFree+


def step_sizes(steps=21, **options):
    """At constant loss and gradient z moves by the step size, in each coordinate."""
    tx = sf_jax.schedule_free_plus(sf_beta1=0.0, **options)
    params, moved = jnp.zeros(3), []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        before = state.z
        updates, state = update(jnp.full(3, 0.2), state, params, value=0.7)
        params = optax.apply_updates(params, updates)
        moved.append(float(before[0] - state.z[0]))
    return np.array(moved) / moved[0]


def test_upstreams_mean_makes_the_step_size_vanish():
    sizes = step_sizes(polyak_beta=0.9, upstream_compatible=True)
    assert f"{sizes[20]:.1e}" == "2.5e-04"


@pytest.mark.parametrize("polyak_beta", [0.0, 0.9])
def test_ours_stays(polyak_beta):
    np.testing.assert_allclose(step_sizes(polyak_beta=polyak_beta), 1, rtol=1e-5)


def test_plus_needs_the_loss():
    tx = sf_jax.schedule_free_plus()
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_the_loss_reaches_plus_inside_other_transformations():
    tx = optax.chain(optax.clip(10.0), sf_jax.schedule_free_plus())
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    state = multi.init(PARAMS)
    for _ in range(2):
        updates, state = multi.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(updates))


def test_plus_without_gradients_moves_nothing():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for polyak_beta in (0.0, 0.9):
        tx = sf_jax.schedule_free_plus(polyak_beta=polyak_beta, weight_decay=1.0)
        updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS, value=1.0)
        jax.tree.map(partial(np.testing.assert_array_equal, 0), updates)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize(
    "make", [sf_jax.schedule_free_prodigy, sf_jax.schedule_free_muon]
)
def test_gradients_of_zero_are_waited_out(make, eps):
    """What optax divides by may be 0 then."""
    tx, params = make(eps=eps), PARAMS
    state, zero = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for grads in (zero, zero, jax.grad(loss)(params, 0)):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if grads is zero:
            jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves((params, state)))
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(updates))


def test_plus_takes_no_step_at_its_floor():
    tx = sf_jax.schedule_free_plus(loss_floor=2.0)
    state = tx.init(PARAMS)
    for value, moves in ((1.5, False), (2.5, True)):
        before = state.z
        _, state = tx.update(PARAMS, state, PARAMS, value=value)
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.z)
        assert any(jax.tree.leaves(moved)) == moves


def test_the_average_begins_after_c_warmup():
    _, x, z = train(sf_jax.schedule_free_plus(c_warmup=4), steps=6)
    for step in range(4):
        close(x["w"][step], z["w"][step])
    close(x["w"][4], z["w"][4])  # the first that has weight has all of it
    assert not np.allclose(x["w"][5], z["w"][5])


def test_beta_grows_to_its_maximum():
    tx = sf_jax.schedule_free_plus(
        sf_beta1=0.9, sf_beta1_anneal_steps=2, sf_beta1_max=0.99
    )
    state, seen = tx.init(PARAMS), []
    for _ in range(4):
        _, state = tx.update(PARAMS, state, PARAMS, value=1.0)
        seen.append(float(state.b1))
    np.testing.assert_allclose(seen, [0.9, 1 - 0.1 * 0.1**0.5, 0.99, 0.99], rtol=1e-6)


def test_plus_on_eight_devices_is_plus_on_one():
    """The sums of the step size go over all devices; 300 steps would tell."""
    tx = sf_jax.schedule_free_plus(
        weight_decay=1.0, sf_beta1_anneal_steps=50, polyak_beta=0.9
    )
    rng = np.random.default_rng(1)
    streams = (
        jax.tree.map(
            lambda p: jnp.asarray(0.2 * rng.normal(size=(300, *p.shape)), p.dtype),
            PARAMS,
        ),
        jnp.asarray(0.8 + 0.1 * rng.normal(size=300), jnp.float32),
    )

    def step(carry, stream):
        params, state = carry
        grads, value = stream
        updates, state = tx.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, sf_jax.eval_params(state, params), state.z)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), streams))
    split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    (_, state), eight = run(jax.device_put(PARAMS, split))
    assert state.z["w"].addressable_shards[0].data.shape == (2, 8)
    jax.tree.map(close, run(PARAMS)[1], eight)


# Prodigy, and what it needs of the wrapper


def test_the_average_weighs_by_what_prodigy_found():
    """With d doubling at each step, W after k steps is the sum of 4^i, w is 4^k."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -state * g, updates), 2 * state

    doubling = optax.GradientTransformation(lambda params: jnp.float32(1), update)
    tx = sf_jax.schedule_free(doubling, 1.0, lr_scale=lambda d: d)
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    for expected in (4 / 4, (4 + 16) / 16, (4 + 16 + 64) / 64):
        _, state = tx.update(params, state, params)
        assert state.weight_ratio == expected


def test_the_base_sees_the_sequence_that_decay_at_names():
    seen = {}

    def base(name):
        def update(updates, state, params=None):
            seen[name] = params
            return jax.tree.map(lambda g: -0.1 * g, updates), state

        return optax.GradientTransformation(lambda params: (), update)

    for name in "xyz":
        tx = sf_jax.schedule_free(base(name), 0.1, decay_at=name)
        params, state = jnp.ones(2), tx.init(jnp.ones(2))
        for step in range(3):
            before = sf_jax.eval_params(state, params), params, state.z
            updates, state = tx.update(jnp.full(2, 1.0 + step), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(seen[name], before["xyz".index(name)], rtol=1e-6)


def test_prodigys_entry_weighs_by_the_number_of_the_step_alone():
    tx = sf_jax.schedule_free_prodigy(warmup_steps=9, variant="algoperf")
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert state.weight_ratio == pytest.approx(1 + 2**-0.75, rel=1e-6)


def test_prodigy_trains_without_a_learning_rate():
    _, x, _ = train(sf_jax.schedule_free_prodigy(), steps=400)
    last = jax.tree.map(lambda leaf: leaf[-1], x)
    start, end = (
        optax.tree.norm(jax.tree.map(jnp.subtract, params, TARGET))
        for params in (PARAMS, last)
    )
    assert end < 0.2 * start


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    # With b2 near 1 optax's own bias correction has fewer digits than ours.
    tx = sf_jax.schedule_free_muon(0.1, b2=0.9, weight_decay=0.5)
    _, x, z = train(tx, steps=5)
    adamw = sf_jax.schedule_free_adamw(0.1, b2=0.9, weight_decay=0.5, decay_at="z")
    _, x_adamw, z_adamw = train(adamw, steps=5)
    close(x["b"], x_adamw["b"])
    close(z["b"], z_adamw["b"])
    before, after = z["w"][3], z["w"][4]
    moved = (after - (1 - 0.1 * 0.5) * before) / 0.1
    # Five Newton-Schulz iterations bring the singular values to about 1.
    assert np.all(np.abs(np.linalg.svd(moved, compute_uv=False) - 1) < 0.5)


NORMUON = partial(sf_jax.schedule_free_muon, 0.02, b2=0.9, row_b2=0.9, weight_decay=0.1)


def test_rows_make_all_outputs_move_alike_by_the_step_of_adamw():
    """At the first step; a column of the kernel is what enters an output."""
    _, _, z = train(NORMUON(weight_decay=0.0), steps=1)
    by_output = jnp.sqrt(jnp.mean((z["w"][0] - PARAMS["w"]) ** 2, axis=0))
    close(by_output, np.full(8, 0.02 * 0.2), rtol=1e-4)


def test_normuon_leaves_the_rest_to_adamw():
    _, x, z = train(NORMUON(), steps=5)
    adamw = sf_jax.schedule_free_adamw(0.02, b2=0.9, weight_decay=0.1, decay_at="z")
    _, x_adamw, z_adamw = train(adamw, steps=5)
    close(x["b"], x_adamw["b"])
    close(z["b"], z_adamw["b"])


def test_dimension_numbers_say_what_a_row_is_and_which_matrices_are_apart():
    """Two kernels, in one leaf, transposed, and with AdamW's leaf beside them."""
    two = {n: jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32) for n in "ab"}
    both = {"ab": jnp.stack([two["a"].T, two["b"].T]), "bias": PARAMS["b"]}
    numbers = {"ab": optax.contrib.MuonDimensionNumbers(2, 1), "bias": None}
    stacked = NORMUON(muon_weight_dimension_numbers=numbers)
    apart, together = NORMUON(), stacked
    state, both_state = apart.init(two), together.init(both)
    for k in range(3):
        grads = jax.tree.map(lambda p, k=k: jnp.cos(p + k), two)
        updates, state = apart.update(grads, state, two)
        stack = jnp.stack([grads["a"].T, grads["b"].T])
        both_updates, both_state = together.update(
            {"ab": stack, "bias": both["bias"]}, both_state, both
        )
        close(both_updates["ab"], jnp.stack([updates["a"].T, updates["b"].T]))


def test_normuon_moves_nothing_without_gradients():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = NORMUON(weight_decay=0.0)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    jax.tree.map(partial(np.testing.assert_array_equal, 0), updates)


BAD_ARGUMENTS = [
    (
        sf_jax.schedule_free_plus,
        {"b2": 1.0},
        r"b2 must be a number in \[0, 1\).*got 1.0",
    ),
    (sf_jax.schedule_free_plus, {"sf_beta1": 1.5}, "sf_beta1.*got 1.5"),
    (sf_jax.schedule_free_plus, {"polyak_beta": 1.0}, "polyak_beta.*got 1.0"),
    (sf_jax.schedule_free_plus, {"c_warmup": -1}, "c_warmup.*got -1"),
    (sf_jax.schedule_free_plus, {"loss_floor": math.nan}, "loss_floor.*got nan"),
    (
        sf_jax.schedule_free_plus,
        {"sf_beta1_anneal_steps": 9, "sf_beta1_max": 1.0},
        "sf_beta1_max.*got 1.0",
    ),
    (sf_jax.gpa_adamw, {"mu_y": 1.1}, "mu_y.*got 1.1"),
    (sf_jax.gpa_adamw, {"mu_x": -0.1}, "mu_x.*got -0.1"),
    (
        sf_jax.gpa_adamw,
        {"mu_y": 0.0, "weight_decay": 0.1, "upstream_compatible": True},
        "mu_y > 0",
    ),
    (sf_jax.schedule_free_prodigy, {"b2": 1.0}, "b2.*got 1.0"),
    (sf_jax.schedule_free_prodigy, {"beta3": 1.0}, "beta3.*got 1.0"),
    (sf_jax.schedule_free_prodigy, {"variant": "paper"}, "variant must be one of"),
    (
        sf_jax.schedule_free_prodigy,
        {"variant": "algoperf", "inner_momentum": 0.9},
        "inner_momentum=0.9 have no place",
    ),
    (
        sf_jax.schedule_free_muon,
        {"upstream_compatible": True},
        "b1=growing_b1",
    ),
    (
        sf_jax.schedule_free_muon,
        {"upstream_compatible": True, "b1": sf_jax.growing_b1(0.6, 9)},
        "warmup_steps=9",
    ),
    (sf_jax.schedule_free_muon, {"momentum": 1.0}, "momentum.*got 1.0"),
    (sf_jax.schedule_free_muon, {"row_b2": 1.0}, "row_b2.*got 1.0"),
    (sf_jax.growing_b1, {"steps": 1}, r"steps must be a whole number in \[2, .*got 1"),
    (sf_jax.refined_average, {"c": -1.0}, r"c must be a number in \[0, .*got -1\.0"),
    (sf_jax.exponential_average, {"mu_x": 2.0}, "mu_x.*got 2.0"),
]


@pytest.mark.parametrize(("factory", "options", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**options)


def test_half_steps_are_refused():
    with pytest.raises(TypeError, match=r"c_warmup must be a whole number.*got 2\.5"):
        sf_jax.schedule_free_plus(c_warmup=2.5)
