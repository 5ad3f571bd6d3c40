"""Schedule-Free run once, against cosine schedules tuned for each horizon.

    python examples/anytime.py [--size small] [--smoke] [--out out/anytime]

A character language model learns the source of Python's standard library. The
Schedule-Free methods each train once, and are evaluated at x along the way. AdamW with
a cosine schedule trains anew for every horizon, since its schedule has to know where it
ends.

Each method has the settings that its authors give, and four trials around them; all
have the same seeds, and a seed gives the initial weights and the order of the data.
Trials are chosen on one held-out text and reported on another: cosine's for each
horizon, the others' once, at the last. A trial is a learning rate, and for
ScheduleFree+ a factor on its own, which is 1 for its authors, and λ.

ScheduleFree+ takes the least possible loss to be 0. The row with a floor is told
another, which is known before any training: the nats a character to which xz
compresses the text that is trained on.

Writes anytime.png, anytime.md and anytime.json. Minutes on two cores; ``--size``
medium and large are meant for a GPU.
"""

import argparse
import json
import lzma
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import corpus
import sf_jax

WARMUP_STEPS = 50
AMUSE_WARMUP_STEPS = 600  # the authors' share of the last of the small size's horizons
PLUS_TRIALS = ((0.1, 20.0), (0.3, 20.0), (1.0, 20.0), (1.0, 50.0))


@dataclass(frozen=True)
class Size:
    """Of the model, its batches and the runs."""

    layers: int
    width: int
    heads: int
    context: int  # characters
    batch: int  # sequences
    horizons: tuple[int, ...]  # steps, rising
    evaluations: int  # along the way to the last horizon
    held_out: int  # sequences in each of the two held-out texts
    seeds: int

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return self.horizons[-1] // self.evaluations


SIZES = {
    "smoke": Size(1, 8, 1, 8, 2, (60, 80, 100), 5, 2, 2),
    "small": Size(1, 32, 2, 32, 8, (400, 800, 1600), 40, 64, 3),
    "medium": Size(4, 128, 4, 128, 32, (2500, 5000, 10000), 40, 128, 3),
    "large": Size(8, 512, 8, 256, 64, (5000, 10000, 20000, 40000), 80, 256, 3),
}


def cosine(lr: jax.Array, horizon: jax.Array) -> optax.GradientTransformation:
    def schedule(count: jax.Array) -> jax.Array:
        way = jnp.clip((count - WARMUP_STEPS) / (horizon - WARMUP_STEPS), 0, 1)
        return lr * jnp.minimum(
            (count + 1) / WARMUP_STEPS, (1 + jnp.cos(jnp.pi * way)) / 2
        )

    return optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.0)


def schedule_free(
    lr: jax.Array, horizon: jax.Array, **options: Any
) -> optax.GradientTransformation:
    """The horizon is not looked at."""
    return sf_jax.schedule_free_adamw(lr, WARMUP_STEPS, 0.9, 0.99, **options)


@cache
def entropy_bound() -> float:
    """Nats a character of the compressed text: what a good model of it needs."""
    text = corpus.load()[0].tobytes()
    return len(lzma.compress(text, preset=9)) * 8 * math.log(2) / len(text)


def schedule_free_plus(
    trial: jax.Array, horizon: jax.Array, has_floor: bool = False
) -> optax.GradientTransformation:
    """As the docstring of the published code recommends it, warmup included."""
    lr, weight_decay = trial
    return sf_jax.schedule_free_plus(
        lambda count: lr * jnp.minimum((count + 1) / WARMUP_STEPS, 1),
        weight_decay=weight_decay,
        r=2.0,
        c_warmup=WARMUP_STEPS,
        loss_floor=entropy_bound() if has_floor else 0.0,
    )


def sf_normuon(lr: jax.Array, horizon: jax.Array) -> optax.GradientTransformation:
    """The settings of arXiv 2605.23061."""
    return sf_jax.schedule_free_muon(
        lr, WARMUP_STEPS, momentum=0.8, row_b2=0.95, b2=0.95, weight_decay=0.05
    )


def amuse(lr: jax.Array, horizon: jax.Array) -> optax.GradientTransformation:
    """The settings of arXiv 2605.22432, whose warmup was 6,000 of 16,000 steps."""
    warmup = AMUSE_WARMUP_STEPS
    b1 = sf_jax.growing_b1(0.6, warmup, rho=0.8)
    return sf_jax.schedule_free_muon(lr, warmup, b1, weight_decay=0.05)


# name -> (how to build it from trial and horizon, the trials). Equally many for each.
METHODS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "Schedule-Free AdamW": (schedule_free, (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "ScheduleFree+": (schedule_free_plus, PLUS_TRIALS),
    "ScheduleFree+, floor": (
        partial(schedule_free_plus, has_floor=True),
        PLUS_TRIALS,
    ),
    "SF-NorMuon": (sf_normuon, (4e-3, 8e-3, 1e-2, 2e-2)),
    "AMUSE": (amuse, (5e-3, 1e-2, 2e-2, 4e-2)),
    "Refined Schedule-Free": (
        partial(schedule_free, average=sf_jax.refined_average(50.0)),
        (2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
}
COSINE = "AdamW, cosine"
METHODS[COSINE] = cosine, (2e-3, 4e-3, 8e-3, 1.6e-2)


# The model: a transformer decoder with learned positions


def initialise(seed: int, size: Size, vocabulary: int) -> Any:
    rng, d = np.random.default_rng(seed), size.width

    def normal(rows: int, columns: int, scale: float) -> np.ndarray:
        return (scale * rng.normal(size=(rows, columns))).astype(np.float32)

    def block() -> dict[str, np.ndarray]:
        return {
            "qkv": normal(d, 3 * d, d**-0.5),
            "out": normal(d, d, (d * size.layers) ** -0.5),
            "up": normal(d, 4 * d, d**-0.5),
            "down": normal(4 * d, d, (4 * d * size.layers) ** -0.5),
            "scales": np.ones((2, d), np.float32),
        }

    return {
        "embedding": normal(vocabulary, d, 0.02),
        "position": normal(size.context, d, 0.02),
        "blocks": [block() for _ in range(size.layers)],
        "scale": np.ones(d, np.float32),
        "unembedding": np.zeros((d, vocabulary), np.float32),
    }


def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def loss(params: Any, tokens: jax.Array, heads: int) -> jax.Array:
    """Nats a character of ``tokens`` (batch, context + 1)."""
    x = params["embedding"][tokens[:, :-1]] + params["position"]
    batch, context, width = x.shape
    for block in params["blocks"]:
        h = normalised(x, block["scales"][0]) @ block["qkv"]
        q, k, v = jnp.split(h.reshape(batch, context, heads, -1), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += mixed.reshape(batch, context, width) @ block["out"]
        h = normalised(x, block["scales"][1]) @ block["up"]
        x += jax.nn.gelu(h) @ block["down"]
    logits = normalised(x, params["scale"]) @ params["unembedding"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


# Training: all trials and seeds of a method at once


def even(length: int, size: Size) -> np.ndarray:
    """Where the held-out windows begin: all over the text."""
    return np.linspace(0, length - size.context - 2, size.held_out).astype(int)


def windows(text: Any, starts: Any, context: int) -> Any:
    return text[starts[:, None] + np.arange(context + 1)]


def load_texts() -> dict[str, np.ndarray]:
    """Tokens to train on, to choose trials by, and to report."""
    train, held_out = corpus.load()
    _, tokens = np.unique(np.concatenate([train, held_out]), return_inverse=True)
    train, held_out = np.split(tokens.astype(np.uint8), [len(train)])
    valid, test = np.array_split(held_out, 2)
    return {"train": train, "valid": valid, "test": test}


def trainer(
    method: str, size: Size, texts: dict[str, np.ndarray]
) -> Callable[[int], dict[str, np.ndarray]]:
    """horizon -> held-out losses at x by text: (trial, seed, evaluation)."""
    make, trials = METHODS[method]
    of = partial(loss, heads=size.heads)
    train = jnp.asarray(texts["train"])
    vocabulary = int(max(text.max() for text in texts.values())) + 1
    held_out = np.stack(
        [
            np.asarray(windows(text, even(len(text), size), size.context))
            for text in (texts["valid"], texts["test"])
        ]
    )

    def start(params: Any, lr: jax.Array) -> Any:
        return params, make(lr, 0).init(params)

    def stretch(
        carry: Any, starts: jax.Array, lr: jax.Array, horizon: jax.Array
    ) -> Any:
        """The steps until the next evaluation, and that."""
        tx = optax.with_extra_args_support(make(lr, horizon))

        def step(carry: Any, starts: jax.Array) -> Any:
            params, state = carry
            batch = windows(train, starts, size.context)
            value, grads = jax.value_and_grad(of)(params, batch)
            updates, state = tx.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, carry, starts)
        params, state = carry
        x = params if method == COSINE else sf_jax.eval_params(state, params)
        return carry, jax.lax.map(partial(of, x), held_out)

    # Over seeds, and outside that over trials.
    begin = jax.jit(jax.vmap(jax.vmap(start, (0, None)), (None, 0)))
    go_on = jax.jit(jax.vmap(jax.vmap(stretch, (0, 0, None, None)), (0, None, 0, None)))

    def run(horizon: int) -> dict[str, np.ndarray]:
        seeds, lrs, found = range(size.seeds), jnp.asarray(trials), []
        params = [initialise(seed, size, vocabulary) for seed in seeds]
        orders = [np.random.default_rng([seed, 1]) for seed in seeds]
        carry = begin(jax.tree.map(lambda *leaves: np.stack(leaves), *params), lrs)
        ends, shape = len(train) - size.context, (size.every, size.batch)
        for _ in range(0, horizon, size.every):
            starts = np.stack([rng.integers(ends, size=shape) for rng in orders])
            carry, losses = go_on(carry, starts, lrs, horizon)
            found.append(losses)
        valid, test = np.moveaxis(np.stack(found, axis=-1), 2, 0)
        return {"valid": valid, "test": test}

    return run


@dataclass
class Run:
    """A method's chosen trial."""

    method: str
    horizon: int  # what the trial was chosen for, and where it ends
    trial: Any
    valid: list[float | None]  # of each trial at the end, by which it was chosen
    steps: list[int]
    test: list[list[float]]  # (seed, evaluation)


def chosen(method: str, horizon: int, found: dict[str, np.ndarray], every: int) -> Run:
    final = found["valid"][:, :, -1].mean(axis=1)
    best = int(np.nanargmin(final))
    valid = [float(loss) if np.isfinite(loss) else None for loss in final]
    steps = every * np.arange(1, horizon // every + 1)
    trial = METHODS[method][1][best]
    test = found["test"][best].tolist()
    return Run(method, horizon, trial, valid, steps.tolist(), test)


def train_all(size: Size, texts: dict[str, np.ndarray]) -> list[Run]:
    runs = []
    for method in METHODS:
        train = trainer(method, size, texts)
        for horizon in size.horizons if method == COSINE else size.horizons[-1:]:
            runs.append(chosen(method, horizon, train(horizon), size.every))
            print_run(runs[-1])
    return runs


def print_run(run: Run) -> None:
    final = np.array(run.test)[:, -1]
    print(
        f"{run.method}, {run.horizon} steps: trial {short(run.trial)} is best, "
        f"{final.mean():.3f} ± {final.std(ddof=1):.3f}"
    )


# What is written


def short(trial: Any) -> str:
    numbers = trial if isinstance(trial, tuple) else (trial,)
    return " and ".join(f"{number:g}" for number in numbers)


def at_horizons(run: Run, horizons: tuple[int, ...]) -> dict[int, np.ndarray]:
    """The test losses over seeds where the run passes a horizon."""
    losses = np.array(run.test)
    return {h: losses[:, run.steps.index(h)] for h in horizons if h in run.steps}


def table(runs: list[Run], horizons: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row a method: mean and spread at each horizon, and the trials chosen."""
    rows = []
    for method in METHODS:
        losses: dict[int, np.ndarray] = {}
        own = [run for run in runs if run.method == method]
        for run in own:
            reached = horizons if method != COSINE else (run.horizon,)
            losses |= at_horizons(run, reached)
        rows.append(
            {
                "method": method,
                "runs": len(own),
                "trials": [run.trial for run in own],
                "mean": {h: float(losses[h].mean()) for h in horizons},
                "spread": {h: float(losses[h].std(ddof=1)) for h in horizons},
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], horizons: tuple[int, ...]) -> str:
    head = ["", "runs", "chosen", *(f"{h} steps" for h in horizons)]
    lines = [head, ["---"] * 3 + ["---:"] * len(horizons)]
    for row in rows:
        cells = [f"{row['mean'][h]:.3f} ± {row['spread'][h]:.3f}" for h in horizons]
        trials = ", ".join(map(short, row["trials"]))
        lines.append([row["method"], str(row["runs"]), trials, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


COLOURS = {
    "Schedule-Free AdamW": "#3b6fd4",
    "ScheduleFree+": "#e2621b",
    "ScheduleFree+, floor": "#f2a65a",
    "SF-NorMuon": "#8b4fc9",
    "AMUSE": "#c2407e",
    "Refined Schedule-Free": "#12897b",
    COSINE: "#6b7280",
}


def figure(runs: list[Run], path: Path) -> None:
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ends = []
    for run in runs:
        losses, colour = np.array(run.test), COLOURS[run.method]
        mean, spread = losses.mean(axis=0), losses.std(axis=0, ddof=1)
        if run.method == COSINE:
            ax.plot(run.steps, mean, color=colour, lw=1, alpha=0.5)
            ends.append((run.horizon, mean[-1], spread[-1]))
            continue
        ax.plot(run.steps, mean, color=colour, lw=2, label=f"{run.method}, one run")
        ax.fill_between(
            run.steps, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0
        )
    at, mean, spread = np.array(ends).T
    ax.errorbar(
        at,
        mean,
        spread,
        color=COLOURS[COSINE],
        marker="o",
        ls="--",
        lw=1.5,
        capsize=3,
        label=f"{COSINE} tuned for each horizon: {len(ends)} runs, and their ends",
    )
    low = min(np.min(np.mean(run.test, axis=0)) for run in runs)
    middle = max(np.mean(run.test, axis=0)[len(run.steps) // 8] for run in runs)
    ax.set_ylim(low - 0.1 * (middle - low), middle)
    ax.set(xlabel="steps", ylabel="test loss at x (nats a character)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e8ec")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--smoke", action="store_true", help="a few steps, for tests")
    parser.add_argument("--out", type=Path, default=Path("out/anytime"))
    arguments = parser.parse_args()
    size = SIZES["smoke" if arguments.smoke else arguments.size]
    start = time.perf_counter()
    runs = train_all(size, load_texts())
    seconds = time.perf_counter() - start

    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows = table(runs, size.horizons)
    text = markdown(rows, size.horizons)
    summary = {
        "size": asdict(size),
        "device": str(jax.devices()[0].device_kind),
        "machine": platform.machine(),
        "seconds": seconds,
        "entropy_bound": entropy_bound(),
        "trials": {method: trials for method, (_, trials) in METHODS.items()},
        "table": rows,
        "runs": [asdict(run) for run in runs],
    }
    figure(runs, out / "anytime.png")
    (out / "anytime.md").write_text(text)
    (out / "anytime.json").write_text(json.dumps(summary, indent=1))
    print(f"\nTest loss in nats a character, mean ± spread of {size.seeds} seeds:\n")
    print(text)
    print(f"{seconds:.0f} s. Written: {', '.join(map(str, sorted(out.iterdir())))}")


if __name__ == "__main__":
    main()
