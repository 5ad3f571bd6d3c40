"""A leaf is known by its path: no key is lost, and no two leaves are one."""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import sf_jax
from sf_jax import _paths, torch_checkpoint

SIZES = (2, 3, 5)  # so that a leaf in another's place would not fit


@jax.tree_util.register_pytree_with_keys_class
class Foreign:
    """A container whose keys JAX knows nothing of."""

    def __init__(self, *children, keys=("left", "right", "middle")):
        self.children, self.keys = children, keys

    def tree_flatten_with_keys(self):
        pairs = zip(map(ForeignKey, self.keys), self.children, strict=False)
        return list(pairs), self.keys

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(*children, keys=keys)


@dataclass(frozen=True)
class ForeignKey:
    word: object


def keys(*names):
    return lambda *leaves: dict(zip(names, leaves, strict=True))


def boxed(*leaves):
    one, two, three = leaves
    box = partial(nn.Partitioned, names=(None,))
    return {"value": box(one), "key": two, "query": {"value": box(three)}}


def variables(*leaves):
    one, two, three = map(nnx.Param, leaves)
    return nnx.State({"value": one, "heads": {"policy": two, "value": three}})


# From three leaves.
TREES = {
    "query_key_value": keys("query", "key", "value"),
    "value_alone": lambda *leaves: {"a": {"value": leaves[0]}, "b": list(leaves[1:])},
    "number_and_word": lambda *leaves: {"a": {0: leaves[0]}, "b": [*leaves[1:]]},
    "dots": keys("a.b", "a/b", "a"),
    "slash": lambda *leaves: {"a/b": leaves[0], "a": {"b": leaves[1], "c": leaves[2]}},
    "foreign": Foreign,
    "boxed": boxed,
    "variables": variables,
}
# JAX sorts a dict's keys, so 0 and "0" can only be siblings in two containers.
TREES["twins"] = lambda *leaves: (Foreign(*leaves, keys=(0, "0", 0.5)),)


def start(make, scale=1.0):
    return make(*(scale * jnp.arange(1.0, size + 1) for size in SIZES))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("store_x", [False, True])
def test_every_leaf_finds_its_own_x(tree, store_x):
    """After two equal steps of 0.1 from y = w with gradients 1: x is w - 0.15.

    z is w - 0.1 and then w - 0.2, and x their mean.
    """
    params = start(TREES[tree])
    tx = sf_jax.schedule_free_sgd(0.1, store_x=store_x)
    state, ones = tx.init(params), jax.tree.map(jnp.ones_like, params)
    y = params
    for _ in range(2):
        updates, state = tx.update(ones, state, y)
        y = optax.apply_updates(y, updates)
    found = [sf_jax.eval_params(state, y)]
    if store_x:
        found.append(sf_jax.eval_params(state))
    for x in found:
        assert jax.tree.structure(x) == jax.tree.structure(params)
        for a, w in zip(jax.tree.leaves(x), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, w - 0.15, rtol=1e-6)
    assert len(set(_paths.paths(params))) == len(SIZES)


@pytest.mark.parametrize("tree", ["query_key_value", "value_alone", "number_and_word"])
def test_a_restored_state_still_finds_every_leaf(tree):
    params = start(TREES[tree])
    tx = sf_jax.schedule_free_sgd(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    y = optax.apply_updates(params, updates)
    x = sf_jax.eval_params(state, y)
    restored = serialization.msgpack_restore(serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, sf_jax.eval_params(restored, y), x)


def test_a_restored_box_is_the_leaf_that_it_held():
    """Beside a leaf that is called "value" itself."""
    params = start(TREES["variables"])
    tx = sf_jax.schedule_free_sgd(0.1)
    state = tx.init(params)
    plain = jax.tree.map(
        lambda v: {"value": next(iter(jax.tree.leaves(v)), None)},
        state._asdict(),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    x = sf_jax.eval_params(plain, params)
    for a, w in zip(jax.tree.leaves(x), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, w)


def test_numbers_and_words_that_a_plain_state_cannot_tell_apart_are_refused():
    """Flat dicts cannot hold both keys, as JAX would have to sort them."""
    state = sf_jax.schedule_free_sgd(0.1).init({"w": jnp.ones(2)})
    plain = {**state._asdict(), "z": {"0": jnp.ones(2)}, "x": {"0": None}}
    twins = [{0: jnp.ones(2)}, {"0": jnp.ones(2)}]
    assert sf_jax.eval_params(plain, twins[0]).keys() == {0}
    assert sf_jax.eval_params(plain, twins[1]).keys() == {"0"}
    with pytest.raises(
        ValueError, match=r"params\[0\] and params\['0'\] have one name"
    ):
        _paths.pair({("0",)}, [(0,), ("0",)], plain=True)


def test_two_leaves_of_one_path_are_refused():
    params = Foreign(jnp.zeros(2), jnp.ones(2), keys=("same", "same"))
    state = sf_jax.schedule_free_sgd(0.1).init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="two leaves share the path"):
        sf_jax.eval_params(state, params)


def test_names_of_a_ported_run_are_one_each():
    model = {"a.b": np.zeros(2), "c": np.zeros(3)}
    params = {"a/b": np.zeros(2), "a": {"b": np.zeros(2)}}
    with pytest.raises(ValueError, match=r"\['a'\]\['b'\] .*\['a/b'\] have one name"):
        torch_checkpoint.guess_names(model, params)


def test_a_ported_leaf_may_be_called_value():
    names = ("query", "key", "value")
    model = {f"{name}.weight": np.full((2, 3), i) for i, name in enumerate(names)}
    params = {name: {"kernel": jnp.zeros((3, 2))} for name in names}
    params["value"] = {"kernel": jnp.zeros((3, 2))}
    rows = torch_checkpoint.guess_names(model, params)
    assert [row.jax for row in rows] == [f"{name}/kernel" for name in names]
    heads = {"policy": jnp.zeros(2), "value": jnp.zeros(3)}
    assert [
        row.jax
        for row in torch_checkpoint.guess_names(
            {"policy": np.zeros(2), "value": np.zeros(3)}, heads
        )
    ] == ["policy", "value"]


# Restored states that lack a part


def plain(**options):
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    tx = sf_jax.schedule_free_adamw(0.1, **options)
    _, state = tx.update(params, tx.init(params), params)
    return params, serialization.msgpack_restore(serialization.to_bytes(state))


def without(tree, *names):
    return {name: leaf for name, leaf in tree.items() if name not in names}


DAMAGE = {
    "z lacks a leaf": (lambda s: {"z": without(s["z"], "b")}, {}, r"no z for .*'b'"),
    "z is gone": (lambda s: {"z": None}, {}, "lacks z"),
    "b1 is gone": (lambda s: {"b1": None}, {}, "lacks b1"),
    "weight_ratio_lo is gone": (
        lambda s: {"weight_ratio_lo": None},
        {},
        "lacks weight_ratio_lo",
    ),
    "x lacks a leaf": (
        lambda s: {"x": without(s["x"], "b")},
        {"store_x": True},
        r"lacks x of .*'b'",
    ),
    "x without z": (
        lambda s: {"z": without(s["z"], "b")},
        {"store_x": True},
        r"lacks z of .*'b'",
    ),
    "x of another shape": (
        lambda s: {"x": {**s["x"], "b": np.ones(2)}},
        {"store_x": True},
        r"x of shape \(2,\) and z of \(3,\)",
    ),
    "z is no array": (lambda s: {"z": {**s["z"], "b": "lost"}}, {}, "no array"),
    "b1 is 7": (lambda s: {"b1": np.float32(7)}, {}, "b1 = 7"),
    "b1 is 0": (lambda s: {"b1": np.float32(0)}, {}, "b1 = 0"),
    "b1 is nan": (lambda s: {"b1": np.float32(np.nan)}, {}, "b1 = nan"),
    "count": (lambda s: {"count": np.int32(-3)}, {}, "count = -3"),
    "weight_ratio": (
        lambda s: {"weight_ratio": np.float32(np.inf)},
        {},
        "weight_ratio = inf",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_restored_state_that_lacks_a_part_is_refused(damage):
    change, options, message = DAMAGE[damage]
    params, state = plain(**options)
    sf_jax.eval_params(state, params)  # whole, it is taken
    damaged = {k: v for k, v in {**state, **change(state)}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        sf_jax.eval_params(damaged, params)
    # Beside another, its leaves would pass for leaves that nothing owns.
    other = {**plain()[1], "z": {"w": {}, "b": {}, "c": np.ones(1)}, "x": {"c": {}}}
    with pytest.raises(ValueError, match=message):
        sf_jax.eval_params([damaged, other], {**params, "c": jnp.ones(1)})


def nested(depth):
    tree = jnp.ones(1)
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def cycle():
    tree = {"w": jnp.ones(1)}
    tree["itself"] = [tree]
    return tree


@pytest.mark.parametrize("tree", [nested(100_000), cycle()], ids=["deep", "cyclic"])
def test_deep_and_cyclic_containers_are_refused(tree):
    params = {"w": jnp.ones(1)}
    state = sf_jax.schedule_free_sgd(0.1).init(params)
    for arguments in (
        (tree, params),
        (state, tree),
        ({"params": tree, "opt_state": state},),
    ):
        with pytest.raises(ValueError, match="levels deep, or contains itself"):
            sf_jax.eval_params(*arguments)


# The live parameters are the y that the state expects


def chained(after, dtype=jnp.float32):
    tx = optax.chain(sf_jax.schedule_free_sgd(0.1, store_x=True), after)
    params = {"w": jnp.array([3.0, -0.2], dtype), "b": jnp.array([1.0], dtype)}
    state = tx.init(params)
    for _ in range(20):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return state, params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wrap", [lambda tx: tx, optax.flatten], ids=["plain", "flat"])
def test_what_comes_last_passes_the_check(dtype, wrap):
    tx = wrap(sf_jax.schedule_free_sgd(0.1, store_x=True))
    params = {"w": jnp.array([3.0, -0.2], dtype), "b": jnp.array([1.0], dtype)}
    state = tx.init(params)
    for step in range(50):
        sf_jax.check_params(state, params)
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p * 7 + s), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    sf_jax.check_params({"params": params, "opt_state": state})


AFTER = {
    "freeze": optax.freeze(True),
    "scale": optax.scale(0.1),
    "non_negative": optax.keep_params_nonnegative(),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("after", AFTER)
def test_what_comes_after_and_moves_y_is_found(after, dtype):
    state, params = chained(AFTER[after], dtype)
    with pytest.raises(ValueError, match=r"not the y .* away from it in params\['"):
        sf_jax.check_params(state, params)


def test_the_distance_is_that_of_the_leaf():
    state, params = chained(optax.identity())
    moved = {**params, "b": params["b"] + 0.5}
    with pytest.raises(ValueError, match=r"0\.5 away from it in params\['b'\]"):
        sf_jax.check_params(state, moved)


def test_where_no_x_is_stored_nothing_can_be_checked():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="store_x=True"):
        sf_jax.check_params(sf_jax.schedule_free_sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match="check_params needs params"):
        sf_jax.check_params(sf_jax.schedule_free_sgd(0.1).init(params))
