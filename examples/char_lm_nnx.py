"""A small character language model in Flax NNX, over Python's standard library.

    python examples/char_lm_nnx.py [--steps 2000] [--out out/char_lm_nnx]
    python examples/char_lm_nnx.py --resume      # goes on from the last checkpoint

Gradients are taken at y, which the model holds; validation and the sample at the end
use a second model, at x. There is no schedule, so `--steps` can be any number, and a
finished run can be resumed with a larger one.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import corpus
import sf_jax.flax

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 128, 2, 4, 64, 32
EVALUATE_EVERY = SAVE_EVERY = 100


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, h: jax.Array, mask: jax.Array) -> jax.Array:
        h += self.attention(self.norms[0](h), mask=mask)
        return h + self.down(nnx.gelu(self.up(self.norms[1](h))))


class Transformer(nnx.Module):
    def __init__(self, width: int, layers: int, rngs: nnx.Rngs):
        self.positions = nnx.Embed(LENGTH, width, rngs=rngs)
        self.tokens = nnx.Embed(corpus.VOCABULARY, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, corpus.VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        h = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            h = block(h, mask)
        return self.logits(self.norm(h))


def loss_of(model: Transformer, batch: jax.Array) -> jax.Array:
    """Nats a byte."""
    logits = model(batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean()


@nnx.jit
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, batch: jax.Array
) -> jax.Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def validate(
    model: Transformer, optimizer: nnx.Optimizer, batches: jax.Array
) -> jax.Array:
    """The loss at x."""
    at_x = sf_jax.flax.eval_model(optimizer, model)
    return jnp.mean(jax.lax.map(partial(loss_of, at_x), batches))


def pure_state(*nodes: nnx.Module | nnx.Optimizer) -> dict:
    return nnx.to_pure_dict(nnx.state(nodes))


def sample(model: Transformer, start: bytes, length: int) -> str:
    """What the model writes, most likely byte by byte, after `start`."""
    logits_of = nnx.jit(lambda model, tokens: model(tokens))
    text = start
    for _ in range(length):
        window = np.frombuffer(text[-LENGTH:].rjust(LENGTH), np.uint8)[None]
        text += bytes([int(logits_of(model, window.astype(np.int32))[0, -1].argmax())])
    return text.decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/char_lm_nnx"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resume", action="store_true", help="from --out's last step")
    parser.add_argument("--smoke", action="store_true", help="tiny, for the tests")
    args = parser.parse_args()
    width, layers = (16, 1) if args.smoke else (WIDTH, LAYERS)
    steps = min(args.steps, 4) if args.smoke else args.steps

    train, validation = corpus.load(limit=20 if args.smoke else None)
    held_out = jnp.stack(
        [corpus.batch(validation, BATCH, LENGTH, seed=1, step=i) for i in range(4)]
    )
    model = Transformer(width, layers, nnx.Rngs(0))
    tx = sf_jax.schedule_free_adamw(0.01, warmup_steps=100, weight_decay=0.01)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=2 if args.smoke else SAVE_EVERY
    )
    directory = (args.out / "checkpoints").resolve()
    with ocp.CheckpointManager(directory, options=options) as manager:
        latest = manager.latest_step()
        if latest is not None and not args.resume:
            parser.error(f"{directory} holds a run: --resume it, or choose an --out")
        if latest is not None:
            target = ocp.args.StandardRestore(pure_state(model, optimizer))
            nnx.update((model, optimizer), manager.restore(latest, args=target))
            print(f"resumed after step {latest}")
        start = int(optimizer.step[...])
        with tqdm(total=steps, initial=start, unit="step") as bar:
            for step in range(start, steps):
                batch = corpus.batch(train, BATCH, LENGTH, seed=0, step=step)
                loss = train_step(model, optimizer, jnp.asarray(batch))
                bar.update()
                if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
                    loss_at_x = validate(model, optimizer, held_out)
                    bar.write(
                        f"step {step + 1:5d}   training loss at y {loss:.3f}"
                        f"   validation loss at x {loss_at_x:.3f}"
                    )
                if manager.should_save(step + 1) or step + 1 == steps:
                    # Model and optimizer: y, z and the rest. x follows from them.
                    state = ocp.args.StandardSave(pure_state(model, optimizer))
                    manager.save(step + 1, args=state, force=True)
        manager.wait_until_finished()
    at_x = sf_jax.flax.eval_model(optimizer, model)
    print(sample(at_x, b"def ", 20 if args.smoke else 300))


if __name__ == "__main__":
    main()
