"""Sources of gradients: a fixed noisy stream, a recorded run, or a small network.

A source keeps the data of every step in ``data``, whose leading axis is the steps. Its
methods ``numpy``, ``jax`` and ``torch`` take (params, the step's data) and return
(loss, gradients). A gradient of None means that the leaf has none at that step.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

Tree = Mapping[str, tuple[int, ...]]  # shapes by leaf


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """``values`` rounded to ``dtype``, in a NumPy dtype that holds them exactly."""
    if np.iscomplexobj(values):
        return values.astype(np.complex128 if dtype == "float64" else np.complex64)
    return values.astype(jnp.dtype(dtype)).astype(
        np.float64 if dtype == "float64" else np.float32
    )


def initial(tree: Tree, dtype: str, is_complex: bool = False) -> dict[str, np.ndarray]:
    """Seeded initial weights with a standard deviation of 0.2."""
    return {
        name: rounded(0.2 * _normal(shape, [1, i], is_complex), dtype)
        for i, (name, shape) in enumerate(tree.items())
    }


def _normal(
    shape: tuple[int, ...], seed: Sequence[int], is_complex: bool = False
) -> np.ndarray:
    # Each leaf has a generator of its own, so that a longer run begins like a shorter.
    rng = np.random.default_rng(seed)
    if not is_complex:
        return np.asarray(rng.normal(size=shape))
    real, imaginary = np.moveaxis(rng.normal(size=(*shape, 2)), -1, 0)
    return np.asarray(real + 1j * imaginary)


class Stream:
    """Gradients that do not depend on the weights: a constant drift plus noise.

    Every voice gets the same numbers, so that voices differ by their own rounding only.

    Args:
      missing: by leaf, the steps at which it has no gradient.
      losses: by step, the loss where it is not a number from 1 to 2.
    """

    def __init__(
        self,
        tree: Tree,
        dtype: str,
        steps: int,
        is_complex: bool = False,
        missing: Mapping[str, frozenset[int]] | None = None,
        losses: Mapping[int, float] | None = None,
    ) -> None:
        grads = {}
        for i, (name, shape) in enumerate(tree.items()):
            drift = _normal(shape, [2, i], is_complex)
            noise = _normal((steps, *shape), [3, i], is_complex)
            # The scale of gradients differs from leaf to leaf.
            grads[name] = 10.0 ** -(i % 3) * (0.2 * drift + noise)
            grads[name][7:8] = 0
        value = 1 + np.random.default_rng(4).uniform(size=steps)
        for k, loss in (losses or {}).items():
            value[k : k + 1] = loss
        self.data: dict[str, Any] = {
            "grads": {name: rounded(g, dtype) for name, g in grads.items()},
            "value": rounded(value, "float64" if dtype == "float64" else "float32"),
        }
        self.missing = missing or {}

    def at(self, k: int) -> dict[str, Any]:
        grads = {
            name: None if k in self.missing.get(name, ()) else g[k]
            for name, g in self.data["grads"].items()
        }
        return {"grads": grads, "value": self.data["value"][k]}

    def numpy(self, params: Any, now: Any) -> tuple[float, dict[str, Any]]:
        return float(now["value"]), now["grads"]

    def jax(self, params: Any, now: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        grads = {n: jnp.asarray(g, params[n].dtype) for n, g in now["grads"].items()}
        return now["value"], grads

    def torch(self, params: Any, now: Any) -> tuple[float, dict[str, Any]]:
        grads = {
            n: None if g is None else torch.as_tensor(g).to(params[n])
            for n, g in now["grads"].items()
        }
        return float(now["value"]), grads


class Recorded(Stream):
    """The gradients of a golden file."""

    def __init__(self, name: str, steps: int) -> None:
        file = recorded(name)
        grads = {n[5:]: g[:steps] for n, g in file.items() if n.startswith("grad/")}
        self.data = {
            "grads": {n: g.astype(np.float64) for n, g in grads.items()},
            "value": file["value"][:steps],
        }
        self.missing = {}


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    """Reads a golden file: init/LEAF, and by step grad/LEAF, y/LEAF, x/LEAF, z/LEAF."""
    with np.load(pathlib.Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        return dict(file)


NETWORK: Tree = {"w1": (6, 8), "b1": (8,), "w2": (8,), "b2": ()}


@dataclasses.dataclass
class Network:
    """A tanh network, fitted to a noisy function and differentiated by each framework.

    loss = mean((tanh(inputs w1 + b1) w2 + b2 - targets)²) / 2
    """

    dtype: str
    steps: int
    batch: int = 16

    def __post_init__(self) -> None:
        inputs = _normal((self.steps, self.batch, 6), [5])
        noise = _normal((self.steps, self.batch), [6])
        targets = np.sin(inputs.sum(-1)) + 0.1 * noise
        self.data = {
            "inputs": rounded(inputs, self.dtype),
            "targets": rounded(targets, self.dtype),
        }

    def at(self, k: int) -> dict[str, np.ndarray]:
        return {name: values[k] for name, values in self.data.items()}

    def numpy(self, p: Any, now: Any) -> tuple[float, dict[str, np.ndarray]]:
        inputs, targets = now["inputs"].astype(float), now["targets"].astype(float)
        hidden = np.tanh(inputs @ p["w1"] + p["b1"])
        error = hidden @ p["w2"] + p["b2"] - targets
        by_output = error / len(targets)
        by_hidden = np.outer(by_output, p["w2"]) * (1 - hidden**2)
        return float(np.mean(error**2) / 2), {
            "w1": inputs.T @ by_hidden,
            "b1": by_hidden.sum(0),
            "w2": hidden.T @ by_output,
            "b2": by_output.sum(),
        }

    def jax(self, params: Any, now: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss(p: dict[str, jax.Array]) -> jax.Array:
            hidden = jnp.tanh(now["inputs"] @ p["w1"] + p["b1"])
            return jnp.mean((hidden @ p["w2"] + p["b2"] - now["targets"]) ** 2) / 2

        return jax.value_and_grad(loss)(params)

    def torch(self, p: Any, now: Any) -> tuple[float, dict[str, Any]]:
        inputs, targets = (torch.as_tensor(a).to(p["w1"]) for a in now.values())
        with torch.enable_grad():
            hidden = torch.tanh(inputs @ p["w1"] + p["b1"])
            loss = torch.mean((hidden @ p["w2"] + p["b2"] - targets) ** 2) / 2
            grads = torch.autograd.grad(loss, list(p.values()))
        return loss.item(), dict(zip(p, grads, strict=True))
