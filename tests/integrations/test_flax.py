"""Flax's own train states and optimizers, as they are; x as a model; Orbax."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import sf_jax
import sf_jax.flax

# Most tests here are about parameters: test_nnx_batchnorm.py is about this warning.
pytestmark = pytest.mark.filterwarnings("ignore:.* were taken at y")

FEATURES, CLASSES, STEPS = 4, 3, 4
LOADER = np.random.default_rng(0).normal(1, 2, (STEPS, 8, FEATURES)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(CLASSES, size=(STEPS, 8))

# Where the state lies inside, and what that leaves in it.
TRANSFORMATIONS = {
    "lean": sf_jax.schedule_free_adamw(0.01, warmup_steps=2),
    "stored": sf_jax.schedule_free_adamw(0.01, store_x=True),
    "chain": optax.chain(optax.clip(0.5), sf_jax.schedule_free_sgd(0.1)),
    "multi_steps": optax.MultiSteps(sf_jax.schedule_free_sgd(0.1), 2),
    "injected": optax.inject_hyperparams(sf_jax.schedule_free_sgd)(0.1),
}


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for width, momentum in ((8, 0.99), (6, 0.9)):
            x = nn.BatchNorm(momentum=momentum, use_running_average=not train)(x)
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs, param_dtype=jnp.float32):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.norms = nnx.List(
            [
                nnx.BatchNorm(FEATURES, momentum=0.99, **options),
                nnx.BatchNorm(8, momentum=0.9, **options),
            ]
        )
        self.hidden = nnx.List(
            [nnx.Linear(FEATURES, 8, **options), nnx.Linear(8, 6, **options)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(6, CLASSES, **options)

    def __call__(self, x):
        for norm, layer in zip(self.norms, self.hidden, strict=True):
            x = jnp.tanh(layer(norm(x)))
        return self.last(self.dropout(x))


class TrainState(train_state.TrainState):
    batch_stats: Any


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, donate_argnums=0)
def linen_step(state, inputs, labels):
    def loss(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(jax.random.key(1), state.step)},
        )
        return cross_entropy(logits, labels), updates["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats)


@nnx.jit
def nnx_step(model, optimizer, inputs, labels):
    grads = nnx.grad(lambda model: cross_entropy(model(inputs), labels))(model)
    optimizer.update(model, grads)


def linen_run(tx, steps=STEPS):
    net = LinenNet()
    variables = net.init(jax.random.key(0), LOADER[0], train=False)
    state = TrainState.create(apply_fn=net.apply, tx=tx, **variables)
    for inputs, labels in zip(LOADER[:steps], LABELS, strict=False):
        state = linen_step(state, inputs, labels)
    return state


def nnx_run(tx, steps=STEPS):
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for inputs, labels in zip(LOADER[:steps], LABELS, strict=False):
        nnx_step(model, optimizer, inputs, labels)
    return model, optimizer


def arrays_of(*models):
    return copy_of(nnx.to_pure_dict(nnx.state(models, nnx.Not(nnx.RngState))))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def copy_of(tree):
    return jax.tree.map(np.array, tree)


assert_equal = partial(jax.tree.map, np.testing.assert_array_equal)
# Two compilations of the same formula: a few roundings of numbers below 4.
assert_close = partial(
    jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
)


@pytest.fixture(scope="module")
def linen_state():
    return linen_run(TRANSFORMATIONS["lean"])


@pytest.fixture(scope="module")
def nnx_pair():
    return nnx_run(TRANSFORMATIONS["lean"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_nnx_optimizer_follows_the_bare_transformation(name, dtype):
    tx = TRANSFORMATIONS[name]
    model = nnx.Linear(2, 2, param_dtype=dtype, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    y = params_of(model)
    state = tx.init(y)
    nnx_update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    update = jax.jit(tx.update)
    for step in range(3):
        grads = nnx.state(model, nnx.Param)
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p + s), grads)
        nnx_update(optimizer, model, grads)
        updates, state = update(nnx.to_pure_dict(grads), state, y)
        y = optax.apply_updates(y, updates)
    assert_equal(params_of(model), y)
    at_x = sf_jax.flax.eval_model(optimizer, model)
    assert_equal(params_of(at_x), sf_jax.eval_params(state, y))
    assert params_of(at_x)["kernel"].dtype == dtype


def test_eval_model_leaves_the_old_one_alone(nnx_pair):
    model, optimizer = nnx_pair
    before = arrays_of(model)
    at_x = sf_jax.flax.eval_model(optimizer, model, LOADER)
    assert_equal(before, arrays_of(model))
    assert at_x.dropout.deterministic
    assert not model.dropout.deterministic
    # Nor does training the new one reach the old one.
    at_x.last.bias[...] += 1
    assert_equal(before, arrays_of(model))


def test_eval_model_works_inside_nnx_jit(nnx_pair):
    model, optimizer = nnx_pair

    @nnx.jit
    def logits_at_x(model, optimizer, batches, inputs):
        return sf_jax.flax.eval_model(optimizer, model, batches)(inputs)

    before = arrays_of(model)
    inside = logits_at_x(model, optimizer, LOADER, LOADER[0])
    assert_equal(before, arrays_of(model))
    at_x = sf_jax.flax.eval_model(optimizer, model, LOADER)
    assert_close(inside, at_x(LOADER[0]))


def test_parameters_that_the_optimizer_does_not_move_come_back_as_they_are():
    model = NnxNet(nnx.Rngs(0))
    only_last = nnx.All(nnx.Param, nnx.PathContains("last"))
    optimizer = nnx.Optimizer(model, sf_jax.schedule_free_sgd(0.1), wrt=only_last)
    grads = nnx.grad(
        lambda model: model(LOADER[0]).sum(), argnums=nnx.DiffState(0, only_last)
    )(model)
    optimizer.update(model, grads)
    at_x = sf_jax.flax.eval_model(optimizer, model)
    x = sf_jax.eval_params(optimizer.opt_state, nnx.state(model, only_last))
    assert_equal(at_x.last.kernel[...], x["last"]["kernel"][...])
    assert_equal(at_x.hidden[0].kernel[...], model.hidden[0].kernel[...])


def own_statistics(layer_inputs):
    """Mean over batches of each batch's mean and variance, in float64."""
    batches = [np.asarray(batch, np.float64) for batch in layer_inputs]
    return (
        np.mean([batch.mean(0) for batch in batches], 0),
        np.mean([batch.var(0) for batch in batches], 0),
    )


def hidden_inputs(params, names):
    """What the second BatchNorm sees, batch by batch, with batch statistics."""
    norm, dense = names
    for batch in LOADER.astype(np.float64):
        scaled = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-5)
        scaled = scaled * params[norm]["scale"] + params[norm]["bias"]
        yield np.tanh(scaled @ params[dense]["kernel"] + params[dense]["bias"])


@pytest.mark.parametrize("batches", [LOADER, list(LOADER)], ids=["array", "iterable"])
def test_linen_statistics_are_the_mean_over_batches_at_x(linen_state, batches):
    rngs = {"dropout": jax.random.key(2)}
    got = sf_jax.flax.eval_variables(linen_state, batches, train=True, rngs=rngs)
    x = sf_jax.eval_params(linen_state)
    assert_equal(got["params"], x)
    mean, var = own_statistics(LOADER)
    first, second = got["batch_stats"].values()
    np.testing.assert_allclose(first["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(first["var"], var, rtol=2e-6)
    mean, var = own_statistics(hidden_inputs(x, ("BatchNorm_0", "Dense_0")))
    np.testing.assert_allclose(second["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(second["var"], var, rtol=1e-5)


@pytest.mark.parametrize("batches", [LOADER, list(LOADER)], ids=["array", "iterable"])
def test_nnx_statistics_are_the_mean_over_batches_at_x(nnx_pair, batches):
    model, optimizer = nnx_pair
    at_x = sf_jax.flax.eval_model(optimizer, model, batches)
    mean, var = own_statistics(LOADER)
    np.testing.assert_allclose(at_x.norms[0].mean[...], mean, rtol=1e-6)
    np.testing.assert_allclose(at_x.norms[0].var[...], var, rtol=2e-6)
    x = params_of(at_x)
    layers = {"norm": x["norms"][0], "dense": x["hidden"][0]}
    mean, var = own_statistics(hidden_inputs(layers, ("norm", "dense")))
    np.testing.assert_allclose(at_x.norms[1].mean[...], mean, atol=1e-6)
    np.testing.assert_allclose(at_x.norms[1].var[...], var, rtol=1e-5)


def test_linen_statistics_compile_once(linen_state):
    traced = []

    def apply_fn(*args, **kwargs):
        traced.append(None)
        return LinenNet().apply(*args, **kwargs)

    state = linen_state.replace(apply_fn=apply_fn)
    for seed in range(3):
        rngs = {"dropout": jax.random.key(seed)}
        sf_jax.flax.eval_variables(state, list(LOADER), train=True, rngs=rngs)
    assert len(traced) == 1


def test_a_linen_train_state_without_batches_keeps_its_statistics(linen_state):
    got = sf_jax.flax.eval_variables(linen_state)
    assert_equal(got["batch_stats"], linen_state.batch_stats)
    plain = train_state.TrainState.create(
        apply_fn=None, params=linen_state.params, tx=TRANSFORMATIONS["lean"]
    )
    assert sf_jax.flax.eval_variables(plain).keys() == {"params"}


def test_what_gives_no_statistics_is_refused(linen_state, nnx_pair):
    model, optimizer = nnx_pair
    of_state = partial(sf_jax.flax.eval_variables, linen_state)
    with pytest.raises(ValueError, match="batches is empty"):
        of_state([], train=True)
    with pytest.raises(ValueError, match="batches is empty"):
        sf_jax.flax.eval_model(optimizer, model, [])
    with pytest.raises(ValueError, match="train=True"):
        of_state(LOADER, train=False)
    with pytest.raises(ValueError, match="no batch_stats"):
        sf_jax.flax.eval_variables(linen_state.replace(batch_stats={}), LOADER)
    plain = nnx.Linear(FEATURES, 2, rngs=nnx.Rngs(0))
    its_own = nnx.Optimizer(plain, sf_jax.schedule_free_sgd(), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"Linear has no nnx\.BatchStat"):
        sf_jax.flax.eval_model(its_own, plain, LOADER)


def test_what_is_no_running_average_becomes_nan(linen_state):
    def apply_fn(variables, batch, mutable):
        return None, {"batch_stats": {"power": 2 * variables["batch_stats"]["power"]}}

    state = linen_state.replace(apply_fn=apply_fn, batch_stats={"power": jnp.ones(2)})
    got = sf_jax.flax.eval_variables(state, LOADER)
    assert np.isnan(got["batch_stats"]["power"]).all()


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        yield manager


def save(manager, tree):
    manager.save(0, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()


def small_run(tx, steps=2):
    """A train state with leaves of both kinds: x recovered and x stored."""
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "h": jnp.ones(2, jnp.bfloat16)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    for _ in range(steps):
        state = state.apply_gradients(grads=jax.tree.map(jnp.cos, state.params))
    return state


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_orbax_gives_a_train_state_back(manager, name):
    tx = TRANSFORMATIONS[name]
    state = small_run(tx)
    save(manager, state)
    fresh = small_run(tx, steps=0)
    restored = manager.restore(0, args=ocp.args.StandardRestore(fresh))
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    assert_equal(restored, state)

    without_target = manager.restore(0)
    assert type(without_target) is dict
    assert_equal(sf_jax.eval_params(without_target), sf_jax.eval_params(state))


@pytest.mark.parametrize("pure", [False, True], ids=["variables", "pure_dict"])
def test_orbax_of_nnx_without_a_target_still_gives_x(manager, nnx_pair, pure):
    model, optimizer = nnx_pair
    tree = {"params": nnx.state(model, nnx.Param), "opt_state": nnx.state(optimizer)}
    save(manager, {k: nnx.to_pure_dict(v) if pure else v for k, v in tree.items()})
    restored = manager.restore(0)
    assert type(restored["opt_state"]) is dict
    x = sf_jax.eval_params(restored)
    expected = nnx.state(sf_jax.flax.eval_model(optimizer, model), nnx.Param)
    assert_equal(jax.tree.leaves(x), jax.tree.leaves(expected))


def test_orbax_gives_an_nnx_run_back(manager, nnx_pair):
    save(manager, nnx.to_pure_dict(nnx.state(nnx_pair)))
    fresh = nnx_run(TRANSFORMATIONS["lean"], steps=0)
    target = nnx.to_pure_dict(nnx.state(fresh))
    nnx.update(fresh, manager.restore(0, args=ocp.args.StandardRestore(target)))
    assert_equal(arrays_of(*fresh), arrays_of(*nnx_pair))


def test_nnx_variables_and_bare_arrays_go_together(nnx_pair):
    model, optimizer = nnx_pair
    y = nnx.state(model, nnx.Param)
    x = sf_jax.eval_params(optimizer.opt_state, nnx.to_pure_dict(y))
    assert_equal(x, params_of(sf_jax.flax.eval_model(optimizer, model)))
