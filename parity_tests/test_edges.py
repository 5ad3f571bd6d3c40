"""Where optimizers break: no step size, no gradient, broken gradients, β at its ends.

Every promise is checked in both frameworks, and nothing may become NaN on the way:
the helpers below look at all that the optimizer holds.
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry import OPTIMIZERS
from parity_tests.registry.options import Linear, Options

Tree = dict[str, np.ndarray]

NAMES = ("sgd", "adamw", "radam")
SHAPES = {"matrix": (2, 3), "scalar": (), "empty": (0, 3)}
ULPS = 8  # of ten steps, some twice as long as the weights


def tree(seed: int, is_complex: bool = False) -> Tree:
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        real = np.asarray(rng.normal(size=shape), np.float32)
        if not is_complex:
            return real
        return np.asarray(real + 1j * rng.normal(size=shape), np.complex64)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


TREES = [tree(k) for k in range(9)]
START, *GRADS = TREES


def zeros(like: Tree = START) -> Tree:
    return {name: np.zeros_like(leaf) for name, leaf in like.items()}


def cast(leaves: Tree, dtype: str) -> Tree:
    """In float64, or rounded to narrower dtypes and float32 again."""
    narrow = {name: np.asarray(leaf, jnp.dtype(dtype)) for name, leaf in leaves.items()}
    wide = np.float64 if dtype == "float64" else np.float32
    return {name: leaf.astype(wide) for name, leaf in narrow.items()}


@dataclasses.dataclass
class End:
    """Where a run ended."""

    y: Tree
    x: Tree
    z: Tree


LOSS = 1.0  # for ScheduleFree+, which asks for it


def in_jax(
    tx: Any, grads: Sequence[Tree], start: Tree = START, dtype: str | None = None
) -> End:
    def to_jax(leaves: Tree) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), leaves)

    params = to_jax(start)
    state = tx.init(params)
    for g in grads:
        # Not jitted: a few steps of small leaves take less than compiling them.
        updates, state = tx.update(to_jax(g), state, params, value=LOSS)
        params = optax.apply_updates(params, updates)
        assert_finite((params, state))
    x, z = sf_jax.eval_params(state, params), state.z
    assert_finite(x)
    return End(*(jax.tree.map(np.asarray, leaves) for leaves in (params, x, z)))


def in_torch(
    build: Any,
    grads: Sequence[Any],
    start: Tree = START,
    dtype: str | None = None,
    each: Any = None,
) -> End:
    def to_torch(leaf: Any) -> torch.Tensor:
        return torch.tensor(leaf, dtype=getattr(torch, dtype) if dtype else None)

    params = {n: torch.nn.Parameter(to_torch(p)) for n, p in start.items()}
    optimizer = build(list(params.values()))
    optimizer.train()
    for k, g in enumerate(grads):
        if each is not None:
            each(optimizer, k)
        for n, p in params.items():
            p.grad = None if g[n] is None else to_torch(g[n])
        optimizer.step(lambda: LOSS)
        assert_finite([*params.values(), *state_of(optimizer)])
    x = dict(zip(params, optimizer.eval_params(), strict=True))
    z = {n: optimizer.state[p].get("z", p) for n, p in params.items()}
    assert_finite(list(x.values()))
    return End(*(jax.tree.map(to_numpy, end) for end in (params, x, z)))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def in_reference(seams: Any, grads: Sequence[Any], start: Tree = START) -> End:
    optimizer = reference.ScheduleFree(start, [(tuple(start), seams)])
    for g in grads:
        optimizer.step(g)
    return End(optimizer.y, optimizer.x, optimizer.z)


def state_of(optimizer: Any) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def assert_finite(node: Any) -> None:
    for leaf in jax.tree.leaves(node):
        finite = leaf.isfinite if isinstance(leaf, torch.Tensor) else None
        assert bool((finite() if finite else np.isfinite(leaf)).all())


def assert_close(ours: Tree, truth: Tree, ulps: float = ULPS) -> None:
    for name, leaf in truth.items():
        largest = np.abs(leaf).max(initial=1.0)
        error = np.abs(ours[name].astype(complex) - leaf).max(initial=0.0)
        assert error <= ulps * 2.0**-23 * largest, name


def run(
    framework: str,
    name: str,
    options: Options,
    grads: Any,
    skip_nonfinite: bool = False,
    **more: Any,
) -> End:
    """The registry's optimizer of this name."""
    row = OPTIMIZERS[name]
    if framework == "jax":
        return in_jax(row.jax(options, False), grads, **more)
    start = options.at(0)

    def build(params: Any) -> Any:
        assert row.torch is not None
        group = {"params": params, **row.arguments(start)}
        group["skip_nonfinite"] = skip_nonfinite
        return row.torch([group], start, "", False)

    def each(optimizer: Any, k: int) -> None:
        optimizer.param_groups[0]["lr"] = options.at(k).lr

    return in_torch(build, grads, each=each, **more)


both = pytest.mark.parametrize("framework", ["jax", "torch"])
each_optimizer = pytest.mark.parametrize("name", NAMES)
NUMBERS: dict[str, list[Callable[[float], Any]]] = {
    "jax": [float, jnp.float32],
    "torch": [float, lambda value: torch.tensor(value, dtype=torch.float64)],
}


@both
@each_optimizer
@pytest.mark.parametrize("form", [0, 1], ids=["float", "array"])
def test_a_learning_rate_of_0_moves_nothing(framework, name, form):
    options = Options(lr=NUMBERS[framework][form](0.0), weight_decay=0.1)
    end = run(framework, name, options, GRADS[:3])
    for leaves in (end.y, end.x, end.z):
        assert_close(leaves, START, 0)


@both
@each_optimizer
@pytest.mark.parametrize("form", [0, 1], ids=["float", "array"])
def test_warmup_may_start_from_0(framework, name, form):
    """Also of optax's kind: its first step has no length and no weight."""

    def lr(k: Any) -> Any:
        value = Linear(0.0, 0.1, 4)(k)
        return NUMBERS[framework][form](value) if framework == "torch" else value

    options = Options(lr=lr, silent_sgd_phase=False)
    end = run(framework, name, options, GRADS)
    exact = dataclasses.replace(options, lr=Linear(0.0, 0.1, 4))
    truth = in_reference(OPTIMIZERS[name].reference(exact), GRADS)
    assert_close(end.y, truth.y)
    assert_close(end.x, truth.x)
    assert np.any(end.x["matrix"] != START["matrix"])


PLAIN = {
    ("jax", "sgd"): lambda: optax.sgd(0.05),
    ("jax", "adamw"): lambda: optax.adamw(0.05, b1=0.0, weight_decay=0.1),
    ("torch", "sgd"): lambda p: torch.optim.SGD(p, lr=0.05),
    ("torch", "adamw"): lambda p: torch.optim.AdamW(
        p, lr=0.05, betas=(0.0, 0.999), weight_decay=0.1
    ),
}


@pytest.mark.parametrize(("framework", "name"), PLAIN)
def test_b1_of_0_trains_as_the_plain_optimizer_and_averages(framework, name):
    """In float64: in float32 optax's bias correction is not exact enough to tell."""
    start, *grads = ({n: p.astype(np.float64) for n, p in t.items()} for t in TREES)
    decay = 0.1 if name == "adamw" else 0.0
    options = Options(lr=0.05, b1=0.0, weight_decay=decay)
    with jax.enable_x64(True):
        end = run(framework, name, options, grads, start=start)
        plain = plain_in_jax if framework == "jax" else plain_in_torch
        ys = plain(PLAIN[framework, name], grads, start)
    assert_close(end.y, ys[-1], 1e-6)
    assert_close(end.z, ys[-1], 1e-6)
    assert_close(end.x, {n: np.mean([y[n] for y in ys], axis=0) for n in start}, 1e-6)


def plain_in_jax(build: Any, grads: Sequence[Tree], start: Tree) -> list[Tree]:
    tx, params, ys = build(), jax.tree.map(jnp.asarray, start), []
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        ys.append(jax.tree.map(np.asarray, params))
    return ys


def plain_in_torch(build: Any, grads: Sequence[Tree], start: Tree) -> list[Tree]:
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in start.items()}
    optimizer, ys = build(list(params.values())), []
    for g in grads:
        for n, p in params.items():
            p.grad = torch.tensor(g[n])
        optimizer.step()
        ys.append({n: p.detach().numpy().copy() for n, p in params.items()})
    return ys


@both
@each_optimizer
def test_b1_of_1_takes_gradients_at_the_average(framework, name):
    options = Options(lr=0.05, b1=1.0, silent_sgd_phase=False)
    end = run(framework, name, options, GRADS)
    assert_close(end.y, end.x, 0)
    assert_close(end.x, in_reference(OPTIMIZERS[name].reference(options), GRADS).x)


OVER_ROOTS = ("adamw", "adamw_paper", "adamw_algoperf", "radam", "refined", "gpa")
any_optimizer = pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("jax", "prodigy"),  # PyTorch's is another package's
        *product(("jax", "torch"), ("sgd", *OVER_ROOTS, "plus")),
    ],
)


@any_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("eps", "inner_momentum"), [(1e-8, 0.0), (0.0, 0.0), (0.0, 0.9)]
)
def test_where_gradients_are_zero_weights_stay(
    framework, name, dtype, eps, inner_momentum
):
    start, *grads = (cast(t, dtype) for t in TREES[:5])
    for g in grads:
        g["matrix"][0] = 0.0
    kind = OPTIMIZERS[name].options
    d0 = {"d0": 1.0} if hasattr(kind, "d0") else {}
    options = kind(
        lr=0.05, eps=eps, inner_momentum=inner_momentum, silent_sgd_phase=False, **d0
    )
    with jax.enable_x64(dtype == "float64"):
        end = run(framework, name, options, grads, start=start, dtype=dtype)
    for leaves in (end.y, end.x, end.z):
        np.testing.assert_array_equal(leaves["matrix"][0], start["matrix"][0])
        assert np.all(leaves["matrix"][1] != start["matrix"][1])


@any_optimizer
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_gradients_of_zero_leave_the_weights_alone(framework, name, eps):
    options = OPTIMIZERS[name].options(lr=0.05, eps=eps, silent_sgd_phase=False)
    end = run(framework, name, options, [zeros()] * 8)
    for leaves in (end.y, end.x, end.z):
        assert_close(leaves, START, 0)


@both
@pytest.mark.parametrize("name", OVER_ROOTS)
@pytest.mark.parametrize("inner_momentum", [0.0, 0.9])
@pytest.mark.parametrize("scale", [1e-17, 1e-19, 1e-25])
def test_gradients_whose_squares_vanish_do_not_throw_the_weights_off(
    framework, name, inner_momentum, scale
):
    """Without eps, which hides it: v is 0, and g is not."""
    lr, b2 = 0.05, 0.999
    options = OPTIMIZERS[name].options(
        lr=lr, b2=b2, eps=0.0, inner_momentum=inner_momentum, silent_sgd_phase=False
    )
    grads = [{n: np.float32(scale) * g for n, g in t.items()} for t in GRADS]
    end = run(framework, name, options, grads)
    # The longest step that Adam takes, that of a gradient after none.
    most = len(grads) * lr / np.sqrt(1 - b2)
    for leaves in (end.y, end.x, end.z):
        for n, leaf in leaves.items():
            assert np.all(np.abs(leaf - START[n]) <= most)


@pytest.mark.parametrize(
    ("framework", "missing"),
    # optax gives every leaf a gradient, if only of zeros.
    [("jax", zeros()["matrix"]), ("torch", zeros()["matrix"]), ("torch", None)],
    ids=["jax-zero", "torch-zero", "torch-none"],
)
@each_optimizer
def test_a_parameter_may_be_without_gradients_for_a_while(framework, name, missing):
    grads: list[Any] = [dict(g) for g in GRADS]
    for k in (0, 1, 2, 5):
        grads[k]["matrix"] = missing
    options = Options(lr=0.05, silent_sgd_phase=False)
    end = run(framework, name, options, grads)
    truth = in_reference(OPTIMIZERS[name].reference(options), grads)
    for sequence in ("y", "x", "z"):
        assert_close(getattr(end, sequence), getattr(truth, sequence))


@both
@each_optimizer
def test_complex_parameters_follow_the_reference(framework, name):
    start = tree(0, is_complex=True)
    grads = [tree(k, is_complex=True) for k in range(1, 9)]
    grads[2] = zeros(start)
    options = Options(lr=0.05, weight_decay=0.1, silent_sgd_phase=False)
    end = run(framework, name, options, grads, start=start)
    truth = in_reference(OPTIMIZERS[name].reference(options), grads, start)
    for sequence in ("y", "x", "z"):
        ours = getattr(end, sequence)
        assert all(leaf.dtype == np.complex64 for leaf in ours.values())
        assert_close(ours, getattr(truth, sequence))


def test_complex_sgd_is_sgd_on_both_parts():
    start = tree(0, is_complex=True)
    grads = [tree(k, is_complex=True) for k in range(1, 5)]
    options = Options(lr=0.05, weight_decay=0.1)
    for framework in ("jax", "torch"):
        whole = run(framework, "sgd", options, grads, start=start)
        for part in (np.real, np.imag):

            def parts(leaves: Tree, part: Any = part) -> Tree:
                return {n: np.ascontiguousarray(part(v)) for n, v in leaves.items()}

            split = run(
                framework, "sgd", options, list(map(parts, grads)), start=parts(start)
            )
            assert_close(parts(whole.x), split.x, 1)
            assert_close(parts(whole.y), split.y, 1)


@each_optimizer
def test_a_tree_without_leaves_is_no_trouble(name):
    tx = OPTIMIZERS[name].jax(Options(), False)
    state = tx.init({})
    updates, state = jax.jit(tx.update)({}, state, {})
    assert updates == {}
    assert sf_jax.eval_params(state, {}) == {}


@pytest.mark.parametrize("name", [*NAMES, "plus"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_if_finite_skips_without_a_trace(name, dtype):
    """The run with broken gradients in between is, bit by bit, the run without.

    And it is that of PyTorch's ``skip_nonfinite``.
    """
    options = OPTIMIZERS[name].options(lr=0.05)
    tx = optax.apply_if_finite(OPTIMIZERS[name].jax(options, False), 10)
    update = jax.jit(tx.update)

    def train(grads: Sequence[Tree]) -> Any:
        params = {n: jnp.asarray(p, dtype) for n, p in START.items()}
        state = tx.init(params)
        for g in grads:
            before = params, state.inner_state
            typed = {n: jnp.asarray(leaf, dtype) for n, leaf in g.items()}
            updates, state = update(typed, state, params, value=LOSS)
            params = optax.apply_updates(params, updates)
            if not state.last_finite:
                equal(before, (params, state.inner_state))
            assert_finite((params, state.inner_state))
        return params, state.inner_state, sf_jax.eval_params(state, params)

    params, state, x = train(with_broken(GRADS))
    equal(train(GRADS), (params, state, x))
    if dtype == "float32":
        ours = run("torch", name, options, with_broken(GRADS), skip_nonfinite=True)
        for theirs, tensors in ((params, ours.y), (x, ours.x), (state.z, ours.z)):
            assert_close(tensors, jax.tree.map(np.asarray, theirs))


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def with_broken(grads: Sequence[Tree]) -> list[Tree]:
    broken = list(grads)
    for at, value in ((5, np.nan), (2, np.inf), (0, -np.inf)):
        bad = {n: leaf.copy() for n, leaf in grads[at].items()}
        bad["matrix"][1, 1] = value
        broken.insert(at, bad)
    return broken


@pytest.mark.parametrize(
    "build",
    [
        lambda p: sf_torch.SGDScheduleFree(p, lr=0.05),
        lambda p: sf_torch.AdamWScheduleFree(p, lr=0.05, warmup_steps=4),
        lambda p: sf_torch.RAdamScheduleFree(p, lr=0.05),
        lambda p: sf_torch.ScheduleFreeWrapper(torch.optim.Adam(p, lr=0.05)),
    ],
    ids=["sgd", "adamw", "radam", "wrapper"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_amp_skips_without_a_trace(build, dtype):
    """A scaled step with broken gradients changes neither weights, state nor counts."""

    def train(grads: Sequence[Tree]) -> list[Any]:
        params = {
            n: torch.nn.Parameter(torch.tensor(p).to(dtype)) for n, p in START.items()
        }
        optimizer = build(list(params.values()))
        optimizer.train()
        # A power of two: scaling back is exact. Growth would only change the power.
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for g in grads:
            before = copied(optimizer, params)
            losses = [(p * torch.tensor(g[n])).sum() for n, p in params.items()]
            optimizer.zero_grad()
            scaler.scale(torch.stack(losses).sum()).backward()
            scaler.unscale_(optimizer)
            finite = all(bool(torch.isfinite(g).all()) for g in gradients(optimizer))
            scaler.step(optimizer)
            scaler.update()
            if not finite:
                same(before, copied(optimizer, params))
            assert_finite([*params.values(), *state_of(optimizer)])
        return copied(optimizer, params)

    same(train(GRADS), train(with_broken(GRADS)))


def gradients(optimizer: Any) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def copied(optimizer: Any, params: dict[str, Any]) -> list[Any]:
    saved = optimizer.state_dict()
    state = [p.detach().clone() for p in params.values()]
    for values in saved["state"].values():
        state += [torch.as_tensor(v).clone() for _, v in sorted(values.items())]
    return [state, [dict(group) for group in saved["param_groups"]]]


def same(a: list[Any], b: list[Any]) -> None:
    assert a[1] == b[1]
    assert len(a[0]) == len(b[0])
    assert all(map(torch.equal, a[0], b[0]))
