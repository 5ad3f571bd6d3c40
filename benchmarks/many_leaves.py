"""A tree of thousands of small leaves in JAX: tracing, compiling and calling a step.

    python -m benchmarks.many_leaves --leaves 1000 3000

Prints one row for each optimizer and number of leaves. Times are in seconds, those of a
call in milliseconds: the median of 15 calls of a donated step. "Compile" is tracing,
lowering and compiling together.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import sf_jax

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "schedule_free_adamw": lambda: sf_jax.schedule_free_adamw(0.01, warmup_steps=10),
    "optax.contrib": lambda: optax.contrib.schedule_free_adamw(0.01, warmup_steps=10),
    "optax.adamw": lambda: optax.adamw(0.01),
}
EVALUATE: dict[str, Callable[[Any, Any], Any]] = {
    "schedule_free_adamw": sf_jax.eval_params,
    "optax.contrib": optax.contrib.schedule_free_eval_params,
}
CALLS = 15


def seconds(fn: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def row(name: str, leaves: int) -> list[float]:
    """Compile, call, init traced, init eager, eval_params eager."""
    tx = OPTIMIZERS[name]()
    params = {f"layer_{i}": {"kernel": jnp.full((8, 8), 0.1)} for i in range(leaves)}
    grads = jax.tree.map(lambda p: 2 * p, params)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, state, grads).compile()
    compiling = time.perf_counter() - start

    # Again, since the first run compiles each operation.
    eager = seconds(tx.init, params)
    jax.eval_shape(tx.init, params)
    jax.clear_caches()
    start = time.perf_counter()
    jax.eval_shape(tx.init, params)
    traced = time.perf_counter() - start
    evaluating = float("nan")
    if name in EVALUATE:
        EVALUATE[name](state, params)
        evaluating = seconds(EVALUATE[name], state, params)

    calls = []
    for _ in range(CALLS):
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, grads))
        calls.append(time.perf_counter() - start)
    return [compiling, 1e3 * statistics.median(calls), traced, eager, evaluating]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, nargs="+", default=[1000, 3000])
    arguments = parser.parse_args()
    print("| leaves | optimizer | compile | call, ms | init traced | init | x |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for leaves in arguments.leaves:
        for name in OPTIMIZERS:
            numbers = " | ".join(f"{number:.3g}" for number in row(name, leaves))
            print(f"| {leaves} | {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
