"""What optimizers that no released package holds did, step by step.

Each file in ``golden/`` holds a fixed stream of gradients and losses, the y, x and z
of another implementation after each of 120 steps, and in ``meta`` where it comes
from. All but GPA's are float64.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sf_jax
import sf_torch

GOLDEN = Path(__file__).parent / "golden"
LEAVES = ("a", "b", "c")

TOLERANCES = {
    "torch.float64": 1e-11,  # thousands of roundings of 1e-16
    # GPA's moments are float32: 120 roundings of 6e-8, and x magnifies those of y and
    # z by 1 / mu_y.
    "torch.float32": 2e-6,
}


class Golden:
    """One file, with its keyword arguments as ours."""

    def __init__(self, path: Path):
        with np.load(path) as data:
            self.data = dict(data)
        self.meta = json.loads(bytes(self.data.pop("meta")))
        self.tolerance = TOLERANCES[self.meta["dtype"]]

    def leaves(self, name: str) -> dict[str, np.ndarray]:
        return {leaf: self.data[f"{name}/{leaf}"] for leaf in LEAVES}

    def check(self, ours: dict[str, dict[str, np.ndarray]]) -> None:
        """``ours[sequence][leaf]`` has a row for each step."""
        for sequence, leaf in ((s, leaf) for s in "yxz" for leaf in LEAVES):
            theirs = np.asarray(self.data[f"{sequence}/{leaf}"], np.float64)
            steps = theirs.shape[0]
            size = np.maximum(1, np.abs(theirs.reshape(steps, -1)).max(axis=1))
            error = np.abs(np.asarray(ours[sequence][leaf]) - theirs)
            worst = error.reshape(steps, -1).max(axis=1) / size
            first = np.argmax(worst > self.tolerance)
            assert worst.max() <= self.tolerance, (
                f"{sequence} of {leaf} parts at step {first}: {worst.max():.1e}"
            )


FILES = {path.stem: path for path in sorted(GOLDEN.glob("*.npz"))}


@pytest.fixture(params=FILES)
def golden(request):
    return Golden(FILES[request.param])


def test_every_file_has_120_steps(golden):
    assert golden.data["value"].shape == (120,)


# JAX

RENAMED = {"lr": "learning_rate", "train_interp_coeff": "mu_y"}


def jax_optimizer(golden: Golden) -> optax.GradientTransformationExtraArgs:
    source, options = golden.meta["source"], dict(golden.meta["kwargs"])
    if "betas" in options:
        options["b1"], options["b2"] = options.pop("betas")
    options = {RENAMED.get(name, name): value for name, value in options.items()}
    if "plus" in source:
        return sf_jax.schedule_free_plus(**options, upstream_compatible=True)
    if "algoperf" in source:
        return sf_jax.schedule_free_adamw(**options, variant="algoperf")
    if "gpa" not in source:
        return sf_jax.schedule_free_adamw(**options)
    if options.pop("iterate_averaging_type", "GPA") == "SCHEDULE_FREE":
        return sf_jax.schedule_free_adamw(
            options["learning_rate"], b1=options["mu_y"], inner_momentum=0.9
        )
    options["mu_x"] = options.pop("eval_interp_coeff", 0.9967)
    options["decay_at"] = "y" if options.pop("use_wd_on_y", False) else "z"
    options["weight_decay"] = float32_decay(**options)
    return sf_jax.gpa_adamw(**options, upstream_compatible=True)


def float32_decay(learning_rate, weight_decay=0.0, **_):
    """The decay of a float32 tensor that is multiplied by ``1 - lr * weight_decay``.

    That number rounded to float32 is off by up to 3e-8, always to the same side: after
    120 steps by more than the tolerance.
    """
    return (1 - float(np.float32(1 - learning_rate * weight_decay))) / learning_rate


def test_jax_follows(golden):
    with jax.enable_x64(True):
        tx = jax_optimizer(golden)
        params, grads, values = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64),
            (golden.leaves("init"), golden.leaves("grad"), golden.data["value"]),
        )

        def step(carry, stream):
            params, state = carry
            grads, value = stream
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            x = sf_jax.eval_params(state, params)
            return (params, state), {"y": params, "x": x, "z": state.z}

        run = jax.jit(lambda *carry: jax.lax.scan(step, carry, (grads, values)))
        _, ours = run(params, tx.init(params))
        golden.check(ours)


# PyTorch


def torch_optimizer(golden, params, **form):
    source, options = golden.meta["source"], dict(golden.meta["kwargs"])
    if "plus" in source:
        options["upstream_compatible"] = True
        return sf_torch.AdamCScheduleFreePlus(params, **options, **form)
    if "algoperf" in source:
        return sf_torch.AdamWScheduleFreeAlgoPerf(params, **options, **form)
    if "gpa" not in source:
        return sf_torch.AdamWScheduleFree(params, **options, **form)
    options["mu_y"] = options.pop("train_interp_coeff", 0.7)
    if options.pop("iterate_averaging_type", "GPA") == "SCHEDULE_FREE":
        betas = options["mu_y"], 0.999
        return sf_torch.AdamWScheduleFree(
            params, options["lr"], betas, inner_momentum=0.9, **form
        )
    options["mu_x"] = options.pop("eval_interp_coeff", 0.9967)
    options["decay_at"] = "y" if options.pop("use_wd_on_y", False) else "z"
    options["weight_decay"] = float32_decay(
        options["lr"], options.get("weight_decay", 0.0)
    )
    return sf_torch.GPAAdamW(params, **options, upstream_compatible=True, **form)


@pytest.mark.parametrize("form", [{}, {"store_x": True}, {"foreach": True}], ids=str)
def test_torch_follows(golden, form):
    params = {
        name: torch.nn.Parameter(torch.as_tensor(leaf, dtype=torch.float64))
        for name, leaf in golden.leaves("init").items()
    }
    optimizer = torch_optimizer(golden, list(params.values()), **form)
    optimizer.train()
    grads, record = golden.leaves("grad"), []
    for k, value in enumerate(golden.data["value"]):
        for name, p in params.items():
            p.grad = torch.as_tensor(grads[name][k], dtype=torch.float64)
        optimizer.step(lambda value=value: value)
        xs = dict(zip(params, optimizer.eval_params(), strict=True))
        zs = {name: optimizer.state[p]["z"] for name, p in params.items()}
        after = {"y": params, "x": xs, "z": zs}
        record.append(jax.tree.map(lambda leaf: leaf.detach().numpy().copy(), after))
    golden.check(jax.tree.map(lambda *steps: np.stack(steps), *record))
