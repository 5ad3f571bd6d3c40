"""What 16-bit state does to models, and to x in a long run.

    python -m benchmarks.sixteen_bits_models

Schedule-Free AdamW in JAX on a CPU, with the forms of `benchmarks.sixteen_bits`: the
digits of scikit-learn in a network of 64, 64 and 10 units, the character model of
`examples/anytime.py`, both evaluated at x in float32, five seeds each; and the noisy
quadratic after 20,000 steps, as the mean squared error of x and as the distance of x
from float32's, in the last digits that bfloat16 has at that x. Prints the tables of
docs/precision.md.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sf_jax
from benchmarks.sixteen_bits import FORMS, problem, x_of

SEEDS = range(5)
# A quarter of the best: there the runs of one seed part by 0.1 nats over a last digit.
CHARACTERS_LR = 0.004
SHOWN = [
    name for name in FORMS if "nearest" not in name and name != "bfloat16, 16-bit z"
]


def at_x(
    params: list[Any],
    batches: Any,
    loss: Callable[[Any, Any], jax.Array],
    form: str,
    **options: Any,
) -> Any:
    """x in float32 after a step for each batch; everything with seeds in front."""
    dtype, of_form = FORMS[form]
    tx = sf_jax.schedule_free_adamw(**options, **of_form)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    @jax.vmap
    def run(params: Any, batches: Any) -> Any:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        carry = params, tx.init(params)
        params, state = jax.lax.scan(step, carry, batches)[0]
        in_full = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return sf_jax.eval_params(state, in_full)

    return run(jax.tree.map(lambda *leaves: np.stack(leaves), *params), batches)


def digits(form: str) -> np.ndarray:
    """Percent of held-out digits that are told right, for each seed."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[500:], order[:500]

    def logits(params: Any, images: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(images @ params["a"] + params["b"])
        return hidden @ params["c"] + params["d"]

    def loss(params: Any, batch: Any) -> jax.Array:
        found = logits(params, jnp.asarray(images, params["a"].dtype)[batch])
        right = jnp.asarray(labels)[batch]
        return optax.softmax_cross_entropy_with_integer_labels(found, right).mean()

    def begin(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return {
            "a": (rng.normal(size=(64, 64)) / 8).astype(np.float32),
            "b": np.zeros(64, np.float32),
            "c": (rng.normal(size=(64, 10)) / 8).astype(np.float32),
            "d": np.zeros(10, np.float32),
        }

    rngs = [np.random.default_rng([seed, 1]) for seed in SEEDS]
    batches = np.stack([rng.choice(train, (1000, 64)) for rng in rngs])
    xs = at_x(
        list(map(begin, SEEDS)),
        batches,
        loss,
        form,
        learning_rate=0.01,
        warmup_steps=50,
    )
    found = jax.vmap(logits, (0, None))(xs, jnp.asarray(images[test])).argmax(-1)
    return 100 * np.mean(np.asarray(found) == labels[test], axis=1)


def characters(form: str) -> np.ndarray:
    """Nats a character of held-out text, for each seed."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import anytime

    size, texts = anytime.SIZES["small"], anytime.load_texts()
    vocabulary = int(max(text.max() for text in texts.values())) + 1
    text = jnp.asarray(texts["train"])
    loss = partial(anytime.loss, heads=size.heads)

    def of_batch(params: Any, starts: jax.Array) -> jax.Array:
        return loss(params, anytime.windows(text, starts, size.context))

    params = [anytime.initialise(seed, size, vocabulary) for seed in SEEDS]
    rngs = [np.random.default_rng([seed, 1]) for seed in SEEDS]
    ends, shape = len(text) - size.context, (size.horizons[-1], size.batch)
    starts = np.stack([rng.integers(ends, size=shape) for rng in rngs])
    xs = at_x(
        params, starts, of_batch, form, learning_rate=CHARACTERS_LR, warmup_steps=50
    )
    held_out = texts["test"]
    batch = anytime.windows(held_out, anytime.even(len(held_out), size), size.context)
    return np.asarray(jax.vmap(loss, (0, None))(xs, jnp.asarray(batch)))


def main() -> None:
    for task in (digits, characters):
        print(f"{task.__name__}: {task.__doc__}")
        for form in SHOWN:
            found = task(form)
            each = " ".join(f"{value:.4g}" for value in found)
            print(f"| {form} | {each} | {found.mean():.4f} |", flush=True)
    print("quadratic, 20,000 steps")
    right = [x_of(seed, jnp.float32, steps=20000) for seed in SEEDS]
    for form in SHOWN:
        dtype, options = FORMS[form]
        errors, apart = [], []
        for seed, wide in zip(SEEDS, right, strict=True):
            x = x_of(seed, dtype, steps=20000, **options)
            errors.append(np.mean((x - problem(seed)[0]) ** 2))
            digit = 2.0 ** (np.frexp(wide)[1] - 8)
            apart.append((x - wide) / digit)
        distance = np.sqrt(np.mean(np.square(apart)))
        each = " ".join(f"{value:.3g}" for value in errors)
        drift = np.mean(apart)
        print(
            f"| {form} | {each} | {np.mean(errors):.3g} | {distance:.2f} {drift:.3f} |"
        )


if __name__ == "__main__":
    main()
