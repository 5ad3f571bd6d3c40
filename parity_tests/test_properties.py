"""What holds for any weights, gradients and hyperparameters; hypothesis looks for more.

The step sizes, β, b2, eps and decay of an example are arguments of one compiled JAX
program per optimizer, so that an example costs milliseconds. They are drawn as float32
numbers: then JAX, PyTorch and the float64 reference are given exactly the same.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from hypothesis import given
from hypothesis import strategies as st

import sf_jax
from parity_tests import reference
from parity_tests.registry import OPTIMIZERS
from parity_tests.registry.options import Options

Tree = dict[str, np.ndarray]

STEPS = 5
NAMES = ("sgd", "adamw", "radam")
ONE = ("adamw",)  # where each other one would be another program to compile
# Trees by name: dtype and shape of each leaf.
TREES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "whole": {"w": ("float32", (3, 2, 2))},
    "alike": dict.fromkeys("abc", ("float32", (2, 2))),
    "mixed": {
        "full": ("float32", (5,)),
        "brain": ("bfloat16", (2, 2)),
        "half": ("float16", (3,)),
        "scalar": ("float32", ()),
        "empty": ("float32", (0, 2)),
    },
}
HALF_ULP = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Example(NamedTuple):
    name: str  # of the optimizer
    tree: str
    store_x: bool
    lr: list[float]  # of every step; 0 for some
    b1: list[float]  # likewise
    b2: float
    weight_decay: float
    r: int
    power: int
    seed: int
    scale: float  # of the gradients

    @property
    def leaves(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return TREES[self.tree]

    def values(self) -> tuple[Tree, list[Tree]]:
        """Weights and gradients, in float32, exact in each leaf's own dtype."""
        rng = np.random.default_rng(self.seed)

        def draw(scale: float) -> Tree:
            return {
                n: np.asarray(
                    jnp.asarray(scale * rng.normal(size=shape), dtype), np.float32
                )
                for n, (dtype, shape) in self.leaves.items()
            }

        return draw(1.0), [draw(self.scale) for _ in range(STEPS)]


def float32(values: Any) -> Any:
    return values.map(lambda value: float(np.float32(value)))


@st.composite
def examples(draw: Any, tree: str, names: Any = NAMES) -> Example:
    rates = float32(st.floats(1e-5, 0.1) | st.sampled_from([0.0, 0.01]))
    store_x = draw(st.booleans())
    # Recovered from y, x is known to 1 / β roundings.
    b1 = st.floats(0.5, 1.0) | st.sampled_from([0.9, 1.0])
    b1 = float32(b1 | st.just(0.0) if store_x else b1)
    constant = draw(st.booleans())

    def each_step(values: Any) -> list[float]:
        if constant:
            return [draw(values)] * STEPS
        return draw(st.lists(values, min_size=STEPS, max_size=STEPS))

    return Example(
        name=draw(st.sampled_from(names)),
        tree=tree,
        store_x=store_x,
        lr=each_step(rates),
        b1=each_step(b1),
        # RAdam's ρ comes as close to 4 as one likes for others; there its step size
        # is as sensitive to rounding as the root of 0.
        b2=draw(float32(st.sampled_from([0.9, 0.95, 0.99, 0.999]))),
        weight_decay=draw(float32(st.just(0.0) | st.floats(0.0, 0.5))),
        r=draw(st.integers(0, 2)),
        power=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**32 - 1)),
        scale=draw(st.sampled_from([1e-3, 1.0, 10.0])),
    )


class Walk(NamedTuple):
    """y, x and z after every step: by leaf (steps, *shape), x and z in float32."""

    y: dict[str, Any]
    x: dict[str, Any]
    z: dict[str, Any]


@functools.cache
def jax_program(name: str, store_x: bool) -> Any:
    """(start, gradients, hyperparameters) -> (walk, last state), compiled once."""

    def run(start: Any, grads: Any, hyper: Any) -> Any:
        o = Options(
            lr=lambda k: hyper["lr"][k],
            b1=lambda k: hyper["b1"][k],
            b2=hyper["b2"],
            weight_decay=hyper["weight_decay"],
            r=hyper["r"],
            weight_lr_power=hyper["power"],
        )
        tx = OPTIMIZERS[name].jax(o, store_x)

        def step(carry: Any, g: Any) -> Any:
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            in_own = sf_jax.eval_params(state, params)
            # Given params, x comes in their dtype; the state has masters in full.
            stored = {} if isinstance(state.x, optax.MaskedNode) else state.x
            x = {
                n: in_own[n] if isinstance(x, optax.MaskedNode) else x
                for n, x in (in_own | stored).items()
            }
            return (params, state), Walk(params, x, state.z)

        return jax.lax.scan(step, (start, tx.init(start)), grads)

    return jax.jit(run)


def in_jax(example: Example, start: Tree, grads: list[Tree], leaves: Any) -> Any:
    """The walk, and the last (params, state)."""

    def typed(tree: Tree) -> Any:
        return {n: jnp.asarray(tree[n], dtype) for n, (dtype, _) in leaves.items()}

    hyper = {
        n: jnp.asarray(getattr(example, n), jnp.float32)
        for n in ("lr", "b1", "b2", "weight_decay", "r", "power")
    }
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *map(typed, grads))
    program = jax_program(example.name, example.store_x)
    last, walk = program(typed(start), stacked, hyper)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), walk), last


def in_torch(example: Example, start: Tree, grads: list[Tree], leaves: Any) -> Walk:
    def typed(tree: Tree) -> dict[str, torch.Tensor]:
        return {
            n: torch.tensor(tree[n]).to(getattr(torch, dtype))
            for n, (dtype, _) in leaves.items()
        }

    params = {n: torch.nn.Parameter(p) for n, p in typed(start).items()}
    row, options = OPTIMIZERS[example.name], options_of(example)
    arguments = row.arguments(options.at(0))
    group = {"params": list(params.values()), "store_x": example.store_x, **arguments}
    assert row.torch is not None
    optimizer = row.torch([group], options.at(0), "", False)
    optimizer.train()
    steps = []
    for k, g in enumerate(map(typed, grads)):
        now = row.arguments(options.at(k))
        for key in ("lr", "betas", "momentum"):
            if key in now:
                optimizer.param_groups[0][key] = now[key]
        for n, p in params.items():
            p.grad = g[n]
        optimizer.step()
        x = dict(zip(params, optimizer.eval_params(torch.float32), strict=True))
        z = {n: optimizer.state[p]["z"] for n, p in params.items()}
        steps.append(
            tuple(
                {n: t.detach().double().numpy().copy() for n, t in leaves.items()}
                for leaves in (params, x, z)
            )
        )
    return stacked(steps)


def in_reference(example: Example, start: Tree, grads: list[Tree]) -> Walk:
    seams = OPTIMIZERS[example.name].reference(options_of(example))
    optimizer = reference.ScheduleFree(start, [(tuple(start), seams)])
    steps = []
    for g in grads:
        optimizer.step(g)
        steps.append((dict(optimizer.y), dict(optimizer.x), dict(optimizer.z)))
    return stacked(steps)


def stacked(steps: list[Any]) -> Walk:
    return Walk(
        *(
            {n: np.stack([leaves[n] for leaves in sequence]) for n in sequence[0]}
            for sequence in zip(*steps, strict=True)
        )
    )


def options_of(example: Example) -> Options:
    return Options(
        lr=lambda k: example.lr[k],
        b1=lambda k: example.b1[k],
        b2=example.b2,
        weight_decay=example.weight_decay,
        r=example.r,
        weight_lr_power=example.power,
    )


def rounding(dtype: str, start: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far a narrow parameter may be from y, by element.

    y' is rounded, its way from p (up to twice as long as either), and then their sum.
    """
    largest = np.maximum(np.abs(y).max(axis=0), np.abs(start))
    least = 2.0**-24 if dtype == "float16" else 0.0  # the spacing of its subnormals
    return 4 * HALF_ULP[dtype] * largest + least


def assert_close(a: Walk, b: Walk, leaves: Any, ulps: float, start: Any = None) -> None:
    """In 2^-23 max(1, max|w|); y of narrow leaves up to their own rounding besides."""
    for sequence in Walk._fields:
        for n, (dtype, _) in leaves.items():
            ours, theirs = getattr(a, sequence)[n], getattr(b, sequence)[n]
            allowed = ulps * 2.0**-23 * np.abs(theirs).max(initial=1.0)
            if sequence == "y" and dtype != "float32":
                allowed = allowed + rounding(dtype, start[n], theirs)
            assert (np.abs(ours - theirs) <= allowed).all(), (sequence, n)


# A rounding of z and of y in each of the steps, the latter in x up to 1 / β times.
AGREE = 2.0 * STEPS


@given(examples(tree="mixed"))
def test_jax_torch_and_the_reference_agree(example):
    start, grads = example.values()
    ours, _ = in_jax(example, start, grads, example.leaves)
    torchs = in_torch(example, start, grads, example.leaves)
    truth = in_reference(example, start, grads)
    assert_close(ours, truth, example.leaves, AGREE, start)
    assert_close(torchs, truth, example.leaves, AGREE, start)
    assert_close(ours, torchs, example.leaves, AGREE, start)


@given(examples(tree="mixed"))
def test_train_params_of_eval_params_is_y(example):
    """Within a rounding of the leaf's dtype."""
    start, grads = example.values()
    walk, (y, state) = in_jax(example, start, grads, example.leaves)
    back = sf_jax.train_params(state, sf_jax.eval_params(state, y))
    for n, (dtype, _) in example.leaves.items():
        magnitude = np.maximum(np.abs(y[n]), np.abs(state.z[n]))
        allowed = 2.0**-23 * np.maximum(1, magnitude)
        if dtype != "float32":
            allowed = rounding(dtype, start[n], walk.y[n])
        assert (np.abs(back[n] - y[n]) <= allowed).all()


def test_a_thousand_switches_drift_by_no_more_than_a_rounding():
    """In JAX, where a switch is a pair of pure functions of the same state."""
    rng = np.random.default_rng(0)
    for b1 in (0.5, 0.9, 0.98):
        tx = sf_jax.schedule_free_sgd(0.1, b1=b1)
        y = jnp.asarray(rng.normal(size=1000), jnp.float32)
        state = tx.init(y)
        for _ in range(5):
            grads = jnp.asarray(rng.normal(size=1000), jnp.float32)
            updates, state = tx.update(grads, state, y)
            y = optax.apply_updates(y, updates)

        def there_and_back(params, _, state=state):
            x = sf_jax.eval_params(state, params)
            return sf_jax.train_params(state, x), None

        last, _ = jax.lax.scan(there_and_back, y, length=1000)
        allowed = 2.0**-23 * jnp.maximum(1, jnp.maximum(jnp.abs(y), jnp.abs(state.z)))
        assert (jnp.abs(last - y) <= allowed).all()


@given(examples(tree="mixed"))
def test_x_is_the_weighted_mean_of_all_z(example):
    start, grads = example.values()
    ours, _ = in_jax(example, start, grads, example.leaves)
    for walk in (ours, in_torch(example, start, grads, example.leaves)):
        lr_max = np.maximum.accumulate(step_sizes(example))
        weights = np.arange(1.0, STEPS + 1) ** example.r * lr_max**example.power
        for n in example.leaves:
            x, z = walk.x[n], walk.z[n]
            for k in range(STEPS):
                total = weights[: k + 1].sum()
                mean = np.asarray(start[n], np.float64)
                if total:
                    mean = np.tensordot(weights[: k + 1], z[: k + 1], 1) / total
                largest = np.abs(z).max(initial=1.0)
                assert (np.abs(x[k] - mean) <= AGREE * 2.0**-23 * largest).all()


def step_sizes(example: Example) -> list[float]:
    step_size = OPTIMIZERS[example.name].reference(options_of(example)).step_size
    return [step_size(reference.Now(k, {}, {}, {}, {}, None, ())) for k in range(STEPS)]


@given(examples(tree="whole", names=ONE))
def test_a_leaf_whole_or_in_pieces_is_the_same(example):
    """Up to an ulp a step: at the end of an array, where no whole vector fits any more,
    compilers may round a multiplication and an addition apart."""
    start, grads = example.values()
    leaves = TREES["alike"]

    def pieces(tree: Tree) -> Tree:
        return dict(zip(leaves, tree["w"], strict=True))

    for package in (walk_in_jax, in_torch):
        whole = package(example, start, grads, example.leaves)
        split = package(example, pieces(start), list(map(pieces, grads)), leaves)
        together = Walk(
            *({"w": np.stack(list(found.values()), axis=1)} for found in split)
        )
        assert_close(whole, together, example.leaves, STEPS)


@given(examples(tree="alike", names=ONE), st.permutations("abc"))
def test_a_permutation_of_leaves_commutes(example, order):
    start, grads = example.values()

    def permuted(tree: Tree) -> Tree:
        return {n: tree[other] for n, other in zip("abc", order, strict=True)}

    for package in (walk_in_jax, in_torch):
        first = package(example, start, grads, example.leaves)
        others = permuted(start), list(map(permuted, grads))
        second = package(example, *others, example.leaves)
        for one, other in zip(first, second, strict=True):
            jax.tree.map(np.testing.assert_array_equal, permuted(one), other)


@given(examples(tree="mixed"), st.permutations(list(TREES["mixed"])))
def test_the_order_of_parameters_is_no_matter_to_torch(example, order):
    """Where dtypes differ, which leaves take their step together changes with it."""
    start, grads = example.values()
    first = in_torch(example, start, grads, example.leaves)
    second = in_torch(example, start, grads, {n: example.leaves[n] for n in order})
    for one, other in zip(first, second, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def walk_in_jax(*arguments: Any) -> Walk:
    return in_jax(*arguments)[0]
