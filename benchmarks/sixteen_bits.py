"""How far x is from the minimum of a noisy quadratic, by the dtypes of the state.

    python -m benchmarks.sixteen_bits --seeds 5

Schedule-Free AdamW on a CPU: 256 weights, 3000 steps of ``lr=0.01``; a gradient is y
less a row of noise about the minimum. Prints the mean squared error of x for each seed,
and its mean as a multiple of float32's, in JAX and for the forms of 12 and of 6 bytes
in PyTorch: the table of docs/precision.md.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import sf_jax
import sf_torch

B16 = jnp.bfloat16
NARROW = {"state_dtype": B16, "moment_dtype": B16, "rounding": "stochastic"}
WIDE_V = {"state_dtype": B16, "rounding": "stochastic"}
# Dtype of the parameters, and options.
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "float32": (jnp.float32, {}),
    "bfloat16": (B16, {}),
    "float32, 16-bit z and v": (jnp.float32, NARROW),
    "bfloat16, 16-bit z, v and x": (B16, NARROW | {"store_x": True}),
    "bfloat16, 16-bit z and v": (B16, NARROW),
    "bfloat16, 16-bit z": (B16, WIDE_V),
    "bfloat16, 16-bit z, to nearest": (B16, {"state_dtype": B16}),
}
B2 = (0.999, 0.9999)


def problem(seed: int, steps: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """The minimum, and a row about it for each step."""
    rng = np.random.default_rng(seed)
    minimum = rng.normal(size=256)
    return minimum, minimum + rng.normal(size=(steps, 256))


def error(seed: int, dtype: Any, **options: Any) -> float:
    """Mean squared error of x."""
    x = x_of(seed, dtype, **options)
    return float(np.mean((x - problem(seed)[0]) ** 2))


def x_of(seed: int, dtype: Any, steps: int = 3000, **options: Any) -> np.ndarray:
    """x after the steps, recovered in float32."""
    _, rows = problem(seed, steps)
    tx = sf_jax.schedule_free_adamw(0.01, **options)

    def step(carry: Any, row: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(params - row, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: jax.Array, rows: jax.Array) -> jax.Array:
        params, state = jax.lax.scan(step, (params, tx.init(params)), rows)[0]
        return sf_jax.eval_params(state, params.astype(jnp.float32))

    x = run(jnp.zeros(256, dtype), jnp.asarray(rows, dtype))
    return np.asarray(x, np.float64)


def errors_in_torch(seeds: Sequence[int], sixteen_bits: bool) -> list[float]:
    """The same in PyTorch, of y, z and v in bfloat16 or of all in float32."""
    dtype = torch.bfloat16 if sixteen_bits else torch.float32
    narrow: dict[str, Any] = {
        "state_dtype": dtype,
        "moment_dtype": dtype,
        "rounding": "stochastic",
    }
    minima, rows = map(np.stack, zip(*map(problem, seeds), strict=True))
    # One parameter with a row for each seed: nothing goes from element to element.
    y = torch.nn.Parameter(torch.zeros(len(seeds), 256, dtype=dtype))
    optimizer = sf_torch.AdamWScheduleFree(
        [y], lr=0.01, **(narrow if sixteen_bits else {})
    )
    optimizer.train()
    for row in torch.tensor(rows).to(dtype).unbind(1):
        y.grad = y.detach() - row
        optimizer.step()
    x = optimizer.eval_params(torch.float64)[0].numpy()
    return np.mean((x - minima) ** 2, axis=1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print("| b2 | parameters and state | error of x by seed | ratio |")
    print("|--:|---|---|--:|")
    for b2 in B2:
        float32 = 0.0
        for name, (dtype, options) in FORMS.items():
            errors = [error(seed, dtype, b2=b2, **options) for seed in seeds]
            float32 = float32 or float(np.mean(errors))
            shown = " ".join(f"{value:.3g}" for value in errors)
            ratio = np.mean(errors) / float32
            print(f"| {b2} | {name} | {shown} | {ratio:.2f} |", flush=True)
    for name, sixteen_bits in (("float32", False), ("bfloat16, 16-bit z and v", True)):
        errors = errors_in_torch(seeds, sixteen_bits)
        float32 = float32 if sixteen_bits else float(np.mean(errors))
        shown = " ".join(f"{value:.3g}" for value in errors)
        ratio = np.mean(errors) / float32
        print(f"| {B2[0]} | in PyTorch: {name} | {shown} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
