"""How close to the truth: float32 against float64, half precision, x64, changing β."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import schedulefree
import torch
from optax import contrib

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.cli import long_run
from parity_tests.compare import harness
from parity_tests.registry import CASES, OPTIMIZERS
from parity_tests.registry.options import Options

BY_NAME = {case.name: case for case in CASES}
FIDELITY_STEPS = 4000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are too small to be shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["adamw", "sgd", "radam"])
def test_x_stays_as_close_to_float64_as_meta(name):
    found = long_run.distances(name, FIDELITY_STEPS, FIDELITY_STEPS, seed=0)
    ulps = {package: float(curve[-1]) for package, curve in found.items()}
    print(f"\n{name}, ulps after {FIDELITY_STEPS:,} steps:", rounded(ulps))
    assert ulps["sf_jax"] <= 1.05 * ulps["meta"]
    assert ulps["sf_torch"] <= 1.05 * ulps["meta"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd", "radam"])
def test_x_stays_as_close_to_float64_as_meta_over_seeds(name):
    packages, steps = ("sf_jax", "sf_torch", "meta"), FIDELITY_STEPS
    runs = [long_run.distances(name, steps, steps, s, packages) for s in range(10)]
    ulps = {p: float(np.mean([run[p][-1] for run in runs])) for p in packages}
    print(f"\n{name}, mean ulps over 10 seeds:", rounded(ulps))
    assert ulps["sf_jax"] <= ulps["meta"]
    assert ulps["sf_torch"] <= ulps["meta"]


def rounded(values):
    return {key: float(f"{value:.3g}") for key, value in values.items()}


# The noisy quadratic: rows are its minimum and noise, the gradient is y - row.
SIZE, STEPS = 256, 3000


def noisy_quadratic():
    rng = np.random.default_rng(0)
    minimum = rng.normal(size=SIZE)
    return minimum, minimum + rng.normal(size=(STEPS, SIZE))


def to_row(y, row):
    return y - row


def jax_error(tx, eval_params, dtype):
    minimum, rows = noisy_quadratic()
    run = long_run.in_jax(tx, eval_params, STEPS, to_row)
    x = run(jnp.zeros(SIZE, dtype), jnp.asarray(rows, dtype))
    return np.mean((np.asarray(x[-1], np.float64) - minimum) ** 2)


def torch_error(package, dtype, **options):
    minimum, rows = noisy_quadratic()
    start = torch.zeros(SIZE, dtype=dtype)
    x = long_run.in_torch(
        lambda p: package.AdamWScheduleFree([p], lr=0.01, **options),
        start,
        torch.tensor(rows, dtype=dtype),
        STEPS,
        to_row,
    )
    return np.mean((x[-1] - minimum) ** 2)


def test_bfloat16_reaches_what_float32_reaches():
    ours, theirs = sf_jax.schedule_free_adamw(0.01), contrib.schedule_free_adamw(0.01)
    their_eval = contrib.schedule_free_eval_params
    error = {
        "sf_jax float32": jax_error(ours, sf_jax.eval_params, jnp.float32),
        "sf_jax bfloat16": jax_error(ours, sf_jax.eval_params, jnp.bfloat16),
        "sf_torch float32": torch_error(sf_torch, torch.float32),
        "sf_torch bfloat16": torch_error(sf_torch, torch.bfloat16),
        "optax bfloat16": jax_error(theirs, their_eval, jnp.bfloat16),
        "Meta bfloat16": torch_error(schedulefree, torch.bfloat16, foreach=False),
    }
    print("\nmean squared error of x:", rounded(error))
    assert error["sf_jax bfloat16"] <= 1.2 * error["sf_jax float32"]
    assert error["sf_torch bfloat16"] <= 1.2 * error["sf_torch float32"]
    # What masters are for: without them it stalls.
    assert error["optax bfloat16"] > 10 * error["sf_jax float32"]
    assert error["Meta bfloat16"] > 10 * error["sf_torch float32"]


@pytest.mark.parametrize("voice", ["jax scan", "jax scan, x stored", "torch"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "radam"])
def test_float64_follows_the_reference_to_1e_12(name, voice):
    outcome = harness.check(BY_NAME[f"{name}/float64"], voice, "reference", steps=1000)
    assert outcome.distance.ulps * 2.0**-52 <= 1e-12


# β as an injected hyperparameter; as a schedule it is in the registry.

PARAMS = {"matrix": (3, 4), "vector": (5,), "scalar": ()}
B1 = (0.9, 0.9, 0.5, 0.98, 1.0, 0.98, 0.7, 0.7)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        n: np.asarray(scale * rng.normal(size=s), np.float32) for n, s in PARAMS.items()
    }


def reference_of(name, options):
    groups = [(tuple(PARAMS), OPTIMIZERS[name].reference(options))]
    return reference.ScheduleFree(tree(0), groups)


def farthest(ours, truth):
    """In float32 ulps of max(1, max|w|)."""
    return max(
        np.abs(np.asarray(ours[n], np.float64) - truth[n]).max()
        / (2.0**-23 * max(1.0, np.abs(truth[n]).max()))
        for n in truth
    )


FACTORIES: dict[str, tuple[Any, float]] = {
    "sgd": (sf_jax.schedule_free_sgd, 0.1),
    "adamw": (sf_jax.schedule_free_adamw, 0.01),
    "radam": (sf_jax.schedule_free_radam, 0.01),
}


@pytest.mark.parametrize("store_x", [False, True])
@pytest.mark.parametrize("name", FACTORIES)
def test_an_injected_b1_may_change_at_any_step(name, store_x):
    factory, lr = FACTORIES[name]
    # Options that are not numbers to be injected are static.
    static = {"state_dtype", "decay_at", "mask", "store_x", "variant"}
    static &= set(inspect.signature(factory).parameters)
    inject = optax.inject_hyperparams(factory, static_args=static)
    tx = inject(lr, b1=B1[0], store_x=store_x)
    params = jax.tree.map(jnp.asarray, tree(0))
    state = tx.init(params)
    truth = reference_of(name, Options(lr=lr, b1=lambda k: B1[k]))
    update = jax.jit(tx.update)
    for k, b1 in enumerate(B1):
        state.hyperparams["b1"] = jnp.asarray(b1)
        grads = tree(k + 1)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        truth.step(grads)
        assert farthest(params, truth.y) <= 6
        assert farthest(sf_jax.eval_params(state, params), truth.x) <= 6


@pytest.mark.parametrize("store_x", [False, True])
@pytest.mark.parametrize("name", FACTORIES)
def test_b1_in_a_group_may_change_at_any_step(name, store_x):
    """Also while a parameter has no gradient, and read in either mode."""
    lr = FACTORIES[name][1]
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in tree(0).items()}
    build = getattr(sf_torch, CLASSES[name])
    optimizer = build(list(params.values()), lr=lr, store_x=store_x)
    optimizer.train()
    group = optimizer.param_groups[0]
    truth = reference_of(name, Options(lr=lr, b1=lambda k: B1[k]))
    for k, b1 in enumerate(B1):
        if name == "sgd":
            group["momentum"] = b1
        else:
            group["betas"] = (b1, group["betas"][1])
        grads = tree(k + 1)
        if k in (2, 4):
            grads["vector"] = None
        for n, p in params.items():
            p.grad = None if grads[n] is None else torch.from_numpy(grads[n])
        optimizer.step()
        truth.step(grads)
        # The reference leaves a y alone whose parameter had no gradient; here all of
        # a group's y are formed with the same β, which is what eval() takes x from.
        y = {n: (1 - b1) * truth.z[n] + b1 * truth.x[n] for n in PARAMS}
        x = dict(zip(PARAMS, optimizer.eval_params(), strict=True))
        assert farthest({n: p.detach() for n, p in params.items()}, y) <= 6
        assert farthest(x, truth.x) <= 6


CLASSES = {
    "sgd": "SGDScheduleFree",
    "adamw": "AdamWScheduleFree",
    "radam": "RAdamScheduleFree",
}

# Half precision in PyTorch; tests/test_jax_contract.py has the same for JAX.

# Bytes a parameter, the parameter itself not counted: z, then moments, then x.
MEMORY = [
    ("sgd", torch.float32, {}, 4),
    ("sgd", torch.float32, {"store_x": True}, 4 + 4),
    ("sgd", torch.float32, {"momentum": 0.0}, 4 + 4),
    ("sgd", torch.bfloat16, {}, 4 + 4),
    ("sgd", torch.bfloat16, {"state_dtype": torch.bfloat16}, 2),
    ("adamw", torch.float32, {}, 4 + 4),
    ("adamw", torch.float64, {}, 8 + 8),
    ("adamw", torch.bfloat16, {}, 4 + 4 + 4),
    ("adamw", torch.float16, {}, 4 + 4 + 4),
    ("adamw", torch.float16, {"state_dtype": torch.float16}, 2 + 4),
    ("adamw", torch.float16, {"moment_dtype": torch.float16}, 4 + 2 + 4),
    ("adamw", torch.float32, {"store_x": True}, 4 + 4 + 4),
    ("adamw", torch.float32, {"inner_momentum": 0.9}, 4 + 4 + 4),
    ("radam", torch.float32, {}, 4 + 4),
]


@pytest.mark.parametrize(("name", "dtype", "options", "expected"), MEMORY)
def test_memory_in_torch_is_as_the_design_says(name, dtype, options, expected):
    p = torch.nn.Parameter(torch.ones(100, dtype=dtype))
    optimizer = getattr(sf_torch, CLASSES[name])([p], **options)
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == expected * p.numel()


@pytest.mark.parametrize("name", CLASSES)
def test_a_mixed_tree_trains_each_leaf_by_its_own_dtype(name):
    """Both frameworks: half leaves round the y that a float32 leaf would have had."""
    dtypes = {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
    start = np.linspace(0.5, 1.5, 8).astype(np.float32)
    factory, lr = FACTORIES[name]
    tx = factory(lr, weight_decay=0.0)
    update = jax.jit(tx.update)
    ours = {d: jnp.asarray(start, d) for d in dtypes}
    exact = {d: ours[d].astype(jnp.float32) for d in dtypes}  # the same start, wide
    state, exact_state = tx.init(ours), tx.init(exact)
    params = {
        d: torch.nn.Parameter(torch.tensor(start).to(getattr(torch, d))) for d in dtypes
    }
    optimizer = getattr(sf_torch, CLASSES[name])(list(params.values()), lr=lr)
    optimizer.train()
    for k in range(12):
        # Exact in every dtype.
        g = np.random.default_rng(k).integers(-8, 9, size=8).astype(np.float32) / 8
        for p in params.values():
            p.grad = torch.tensor(g).to(p.dtype)
        optimizer.step()
        updates, state = update({d: jnp.asarray(g, d) for d in dtypes}, state, ours)
        ours = optax.apply_updates(ours, updates)
        wide = dict.fromkeys(dtypes, jnp.asarray(g))
        updates, exact_state = update(wide, exact_state, exact)
        exact = optax.apply_updates(exact, updates)
    x = sf_jax.eval_params(exact_state, exact)
    torch_x = dict(zip(dtypes, optimizer.eval_params(torch.float32), strict=True))
    in_own = dict(zip(dtypes, optimizer.eval_params(), strict=True))
    jax_x = sf_jax.eval_params(state, ours)
    for d, half_ulp in dtypes.items():
        y, rounding = np.asarray(exact[d]), 2.0**-22 + half_ulp * np.abs(exact[d])
        assert np.all(np.abs(np.asarray(ours[d], np.float32) - y) <= rounding)
        assert np.all(np.abs(params[d].detach().float().numpy() - y) <= rounding)
        assert farthest({d: torch_x[d].numpy()}, {d: np.asarray(x[d])}) <= 3
        assert torch_x[d].dtype == torch.float32
        assert in_own[d].dtype == params[d].dtype
        assert jax_x[d].dtype == ours[d].dtype
        if d != "float32":
            assert state.x[d].dtype == state.z[d].dtype == jnp.float32
            assert farthest({d: state.x[d]}, {d: np.asarray(x[d])}) <= 3
