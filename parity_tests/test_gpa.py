"""GPA's published code, step by step, its decay included.

Each file in ``golden/`` holds a fixed stream of gradients, the y, x and z of another
implementation after each of 120 steps, and in ``meta`` where it comes from. Those of
GPA have cases of their own here and not in the registry: they are float32, and their
decay moves x besides the rule.
"""

import json
from pathlib import Path
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

GOLDEN = Path(__file__).parent / "golden"
GPA = OPTIMIZERS["gpa"]
LEAVES = ("a", "b", "c")
# The moments are float32: 120 roundings of 6e-8, and x magnifies those of y and z.
TOLERANCE = 2e-6


class Golden:
    """One file, with its keyword arguments as ours."""

    def __init__(self, path: Path):
        with np.load(path) as data:
            self.data = dict(data)
        self.meta = json.loads(bytes(self.data.pop("meta")))

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
            first = np.argmax(worst > TOLERANCE)
            assert worst.max() <= TOLERANCE, (
                f"{sequence} of {leaf} parts at step {first}: {worst.max():.1e}"
            )


FILES = {path.stem: path for path in sorted(GOLDEN.glob("gpa_*.npz"))}


@pytest.fixture(params=FILES)
def golden(request):
    return Golden(FILES[request.param])


def test_every_file_has_120_steps(golden):
    assert golden.data["value"].shape == (120,)


# JAX


def coefficients(golden: Golden) -> tuple[bool, dict[str, Any]]:
    """Whether it is its Schedule-Free mode, and its options in our names."""
    options = dict(golden.meta["kwargs"])
    plain = options.pop("iterate_averaging_type", "GPA") == "SCHEDULE_FREE"
    lr, decay = options["lr"], options.get("weight_decay", 0.0)
    return plain, {
        "lr": lr,
        "mu_y": options.get("train_interp_coeff", 0.7),
        "mu_x": options.get("eval_interp_coeff", 0.9967),
        "weight_decay": float32_decay(lr, decay),
        "decay_at": "y" if options.get("use_wd_on_y", False) else "z",
    }


def jax_optimizer(golden: Golden) -> optax.GradientTransformationExtraArgs:
    plain, o = coefficients(golden)
    lr = o.pop("lr")
    if plain:
        return sf_jax.schedule_free_adamw(lr, b1=o["mu_y"], inner_momentum=0.9)
    return sf_jax.gpa_adamw(lr, **o, upstream_compatible=True)


def float32_decay(lr, weight_decay):
    """The decay of a float32 tensor that is multiplied by ``1 - lr * weight_decay``.

    That number rounded to float32 is off by up to 3e-8, always to the same side: after
    120 steps by more than the tolerance.
    """
    return (1 - float(np.float32(1 - lr * weight_decay))) / lr


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


# The reference


def reference_optimizer(golden, params):
    plain, o = coefficients(golden)
    options = GPA.options(lr=o["lr"], b1=o["mu_y"], mu_x=o["mu_x"], inner_momentum=0.9)
    if plain:
        seams = OPTIMIZERS["adamw"].reference(options)
        return reference.ScheduleFree(params, [(LEAVES, seams)])
    return reference.HeldDecay(
        params,
        [(LEAVES, GPA.reference(options))],
        shrink=o["lr"] * o["weight_decay"],
        at=o["decay_at"],
        b1=o["mu_y"],
    )


def test_reference_follows(golden):
    optimizer = reference_optimizer(golden, golden.leaves("init"))
    grads, record = golden.leaves("grad"), []
    for k, value in enumerate(golden.data["value"]):
        optimizer.step({name: grads[name][k] for name in LEAVES}, float(value))
        record.append({s: dict(getattr(optimizer, s)) for s in "yxz"})
    golden.check(jax.tree.map(lambda *steps: np.stack(steps), *record))


# PyTorch


def torch_optimizer(golden, params, **form):
    plain, o = coefficients(golden)
    if plain:
        return sf_torch.AdamWScheduleFree(
            params, o["lr"], (o["mu_y"], 0.999), inner_momentum=0.9, **form
        )
    return sf_torch.GPAAdamW(params, **o, upstream_compatible=True, **form)


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
