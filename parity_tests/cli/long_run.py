"""Long float32 runs: how far each package's x is from the float64 reference.

    python -m parity_tests long-run

trains 512 weights for 20,000 steps with AdamW and SGD, draws
``docs/images/long_run.png`` and writes the table in ``docs/parity.md``.

The reference takes the gradients of a noisy quadratic, rounded to float32. Every
package is then given exactly these gradients, so that packages differ by their own
rounding only.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from optax import contrib

import sf_jax
from parity_tests import reference
from parity_tests.registry import OPTIMIZERS
from parity_tests.registry.options import Options

WEIGHTS = 512
STEPS = 20_000
EVERY = 500
SETTINGS = {
    "adamw": Options(lr=0.01, weight_decay=0.1),
    "sgd": Options(lr=0.1, weight_decay=0.1),
    "radam": Options(lr=0.01, weight_decay=0.1),
}
DOCS = Path(__file__).parents[2] / "docs"
NAMES = {"sf_jax": "sf_jax", "sf_torch": "sf_torch", "meta": "schedulefree 1.4.1"}
NAMES["optax"] = "optax.contrib"

Gradient = Callable[[Any, Any], Any]
"""(parameters, the step's row of data) -> gradient, in either framework."""


class Run(NamedTuple):
    """The reference's run, and the gradients that the packages are given."""

    start: np.ndarray  # (weights,) float32
    grads: np.ndarray  # (steps, weights) float32
    x: np.ndarray  # (steps / every, weights) float64: after every so many steps


def reference_run(name: str, steps: int, every: int, seed: int) -> Run:
    """Runs the reference on a noisy quadratic with curvatures from 0.01 to 1."""
    rng = np.random.default_rng(seed)
    start = rng.normal(size=WEIGHTS).astype(np.float32)
    curvature = 10.0 ** rng.uniform(-2, 0, size=WEIGHTS)
    target = rng.normal(size=WEIGHTS)
    grads = np.empty((steps, WEIGHTS), np.float32)
    seams = OPTIMIZERS[name].reference(SETTINGS[name])
    optimizer = reference.ScheduleFree({"w": start}, [(("w",), seams)])
    xs = []
    for k in range(steps):
        noise = 0.1 * rng.normal(size=WEIGHTS)
        grads[k] = curvature * (optimizer.y["w"] - target) + noise
        optimizer.step({"w": grads[k]})
        if (k + 1) % every == 0:
            xs.append(optimizer.x["w"])
    return Run(start, grads, np.array(xs))


def fed(y: Any, row: Any) -> Any:
    """A :data:`Gradient` that is the row itself and does not depend on y."""
    return row


def in_jax(
    tx: optax.GradientTransformation,
    eval_params: Callable[[Any, Any], Any],
    every: int,
    gradient: Gradient = fed,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(start, rows) -> x after every so many steps, as one compiled program."""

    def step(carry: Any, row: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(gradient(params, row), state, params)
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, rows)
        return carry, eval_params(carry[1], carry[0])

    @jax.jit
    def run(start: jax.Array, rows: jax.Array) -> jax.Array:
        stretches = rows.reshape(-1, every, *start.shape)
        return jax.lax.scan(stretch, (start, tx.init(start)), stretches)[1]

    return run


def in_torch(
    build: Callable[[torch.nn.Parameter], Any],
    start: torch.Tensor,
    rows: torch.Tensor,
    every: int,
    gradient: Gradient = fed,
) -> np.ndarray:
    """x after every so many steps, in float64."""
    p = torch.nn.Parameter(start.clone())
    optimizer = build(p)
    optimizer.train()
    xs = []
    for k, row in enumerate(rows):
        # A copy: Meta's optimizers write into the gradient.
        p.grad = gradient(p.detach(), row).clone()
        optimizer.step()
        if (k + 1) % every == 0:
            # eval() and train() would round y at each measurement. It is put back.
            y = p.detach().clone()
            optimizer.eval()
            xs.append(p.detach().double().numpy())
            optimizer.train()
            p.data.copy_(y)
    return np.array(xs)


@functools.cache
def _jax_run(name: str, package: str, every: int) -> Any:
    row, options = OPTIMIZERS[name], SETTINGS[name]
    if package == "optax":
        assert row.optax is not None
        evaluate = contrib.schedule_free_eval_params
        return in_jax(row.optax(options), evaluate, every)
    return in_jax(row.jax(options, False), sf_jax.eval_params, every)


def x_of(package: str, name: str, run: Run, every: int) -> np.ndarray:
    """x in the package ("sf_jax", "sf_torch", "meta", "optax"), given the run."""
    row, options = OPTIMIZERS[name], SETTINGS[name]
    if package in ("sf_jax", "optax"):
        start, grads = jnp.asarray(run.start), jnp.asarray(run.grads)
        return np.asarray(_jax_run(name, package, every)(start, grads), np.float64)
    make = row.meta if package == "meta" else row.torch
    assert make is not None

    def build(p: torch.nn.Parameter) -> Any:
        group = {"params": [p], **row.arguments(options)}
        return make([group], options, "", False)

    tensors = torch.from_numpy(run.start), torch.from_numpy(run.grads)
    return in_torch(build, *tensors, every)


def distances(
    name: str, steps: int, every: int, seed: int, packages: Any = tuple(NAMES)
) -> dict[str, np.ndarray]:
    """By package max|x - reference's x|, in units of 2^-23 max(1, max|x|)."""
    run = reference_run(name, steps, every, seed)
    unit = 2.0**-23 * np.maximum(1, np.abs(run.x).max(axis=1))
    return {
        package: np.abs(x_of(package, name, run, every) - run.x).max(axis=1) / unit
        for package in packages
        if getattr(OPTIMIZERS[name], package, True) is not None
    }


def table(found: Mapping[str, Mapping[str, np.ndarray]], every: int) -> str:
    """Markdown: a row per optimizer and package, a column per number of steps."""
    length = len(next(iter(next(iter(found.values())).values())))
    shown = sorted({length * part // 20 for part in (1, 2, 5, 10, 20)})
    heads = [f"{every * i:,}" for i in shown]
    lines = [
        "| steps | | " + " | ".join(heads) + " |",
        "|---|---|" + "--:|" * len(heads),
    ]
    for name, by_package in found.items():
        for package, curve in by_package.items():
            cells = [f"{curve[i - 1]:.0f}" for i in shown]
            lines.append(f"| {name} | {NAMES[package]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Mapping[str, np.ndarray]], every: int, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(found), figsize=(9, 3.4), sharey=True, layout="constrained"
    )
    for ax, (name, by_package) in zip(np.atleast_1d(axes), found.items(), strict=True):
        for package, curve in by_package.items():
            steps = every * np.arange(1, len(curve) + 1)
            ax.plot(steps, curve, label=NAMES[package])
        ax.set(title=name, xlabel="step", yscale="log")
        ax.locator_params(axis="x", nbins=5)
        ax.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("distance of x from float64\n(float32 ulps)")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def insert(text: str, region: str, content: str) -> str:
    """``text`` with ``content`` between the two marks of the region."""
    begin, end = f"<!-- {region}: begin -->\n", f"<!-- {region}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(
            f"no region {region!r} in the document. Put {begin.strip()} and {end} "
            "where the table belongs, each on a line of its own."
        )
    return before + begin + content + end + after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of parity.md and images/"
    )


def run(arguments: argparse.Namespace) -> int:
    found = {
        name: distances(name, arguments.steps, arguments.every, arguments.seed)
        for name in ("adamw", "sgd")
    }
    document = arguments.docs / "parity.md"
    content = table(found, arguments.every)
    document.write_text(insert(document.read_text(), "long-run", content))
    plot(found, arguments.every, arguments.docs / "images" / "long_run.png")
    print(content, end="")
    return 0
