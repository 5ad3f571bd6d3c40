"""A tree of thousands of small leaves in JAX: tracing, compiling and calling a step.

    python -m benchmarks.many_leaves --leaves 300 1000

Prints one row for each number of leaves, clock and optimizer. The optimizers take turns
in each round. A row gives for each column the least of all rounds, and in brackets the
median, in milliseconds. The clocks are that of the wall and the processor time of this
process, which is disturbed less by others on the machine.

compile
    tracing, lowering and compiling a step whose params and state are donated
call
    a call of that step
init traced
    ``jax.eval_shape(init, params)``, which traces and computes nothing
init
    ``init`` outside of jit, after a first call that compiled its operations
x
    the parameters to evaluate, outside of jit, after such a first call
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import sf_jax

# All of them do the same work beside what makes them differ: optax.adamw decays too.
NUMBERS: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "schedule_free_adamw": lambda: sf_jax.schedule_free_adamw(
        warmup_steps=10, **NUMBERS
    ),
    "optax.contrib": lambda: optax.contrib.schedule_free_adamw(
        warmup_steps=10, **NUMBERS
    ),
    "optax.adamw": lambda: optax.adamw(**NUMBERS),
}
EVALUATE: dict[str, Callable[[Any, Any], Any]] = {
    "schedule_free_adamw": sf_jax.eval_params,
    "optax.contrib": optax.contrib.schedule_free_eval_params,
}
COLUMNS = ("compile", "call", "init traced", "init", "x")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
CALLS = 15  # in each round, of a compiled step
REPETITIONS = 5  # in each round, of all else but compiling


class Run(NamedTuple):
    """An optimizer with the arrays that it moves."""

    tx: optax.GradientTransformation
    params: Any
    state: Any
    step: Any  # compiled


Times = dict[tuple[str, str, str], list[float]]  # of (optimizer, column, clock)


def timed(
    times: Times, name: str, column: str, fn: Callable[..., Any], *args: Any
) -> Any:
    gc.collect()  # of what others left behind
    starts = [clock() for clock in CLOCKS.values()]
    result = jax.block_until_ready(fn(*args))
    for (label, clock), start in zip(CLOCKS.items(), starts, strict=True):
        times.setdefault((name, column, label), []).append(clock() - start)
    return result


def tree(leaves: int) -> Any:
    return {
        f"layer_{i}": {"kernel": jnp.full((8, 8), 0.1, jnp.float32)}
        for i in range(leaves)
    }


def compiled(times: Times, name: str, leaves: int) -> Run:
    tx, params = OPTIMIZERS[name](), tree(leaves)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def compile_it() -> Any:
        jitted = jax.jit(step, donate_argnums=(0, 1))
        return jitted.lower(params, state, params).compile()

    jax.clear_caches()
    executable = timed(times, name, "compile", lambda: (compile_it(),))[0]
    return Run(tx, params, state, executable)


def measure(leaves: int, rounds: int) -> Times:
    times: Times = {}
    grads = jax.tree.map(lambda p: 2 * p, tree(leaves))
    for turn in range(rounds):
        names = list(OPTIMIZERS)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        runs = {name: compiled(times, name, leaves) for name in names}
        for _ in range(REPETITIONS):
            for name, run in runs.items():
                jax.clear_caches()
                timed(
                    times, name, "init traced", jax.eval_shape, run.tx.init, run.params
                )
        # What is timed first compiles operations, or finds the memory cold.
        ignored: Times = {}
        for repetition in range(1 + REPETITIONS):
            kept = times if repetition else ignored
            for name, run in runs.items():
                timed(kept, name, "init", run.tx.init, run.params)
                if name in EVALUATE:
                    timed(kept, name, "x", EVALUATE[name], run.state, run.params)
        for repetition in range(1 + CALLS):
            kept = times if repetition else ignored
            for name, (tx, params, state, step) in runs.items():
                params, state = timed(kept, name, "call", step, params, state, grads)
                runs[name] = Run(tx, params, state, step)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| leaves | clock | optimizer |", " | ".join(COLUMNS), "|")
    print("|--:|---|---|" + "--:|" * len(COLUMNS))
    for leaves in arguments.leaves:
        times = measure(leaves, arguments.rounds)
        for clock in CLOCKS:
            for name in OPTIMIZERS:
                cells = [
                    f"{1e3 * min(found):.3g} ({1e3 * statistics.median(found):.3g})"
                    if (found := times.get((name, column, clock)))
                    else "-"
                    for column in COLUMNS
                ]
                print(f"| {leaves} | {clock} | {name} |", " | ".join(cells), "|")
        print(end="", flush=True)


if __name__ == "__main__":
    main()
