"""A small character language model in Flax Linen, over Python's standard library.

    python examples/char_lm_linen.py [--steps 2000] [--out out/char_lm_linen]
    python examples/char_lm_linen.py --resume      # goes on from the last checkpoint

Gradients are taken at y, the live parameters; validation and the sample at the end
use x, `sf_jax.eval_params(state)`. There is no schedule, so `--steps` can be any
number, and a finished run can be resumed with a larger one.
"""

import argparse
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from tqdm import tqdm

import corpus
import sf_jax

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 128, 2, 4, 64, 32
EVALUATE_EVERY, SAVE_EVERY = 100, 100


class Transformer(nn.Module):
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = nn.Embed(LENGTH, self.width)(jnp.arange(tokens.shape[1]))
        h = nn.Embed(corpus.VOCABULARY, self.width)(tokens) + positions
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            h += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(h), mask=mask)
            wide = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h)))
            h += nn.Dense(self.width)(wide)
        return nn.Dense(corpus.VOCABULARY)(nn.LayerNorm()(h))


def loss_at(state: TrainState, params: optax.Params, batch: jax.Array) -> jax.Array:
    """Nats a byte."""
    logits = state.apply_fn({"params": params}, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses.mean()


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    loss, grads = jax.value_and_grad(partial(loss_at, state))(state.params, batch)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def validate(state: TrainState, batches: jax.Array) -> jax.Array:
    """The loss at x."""
    x = sf_jax.eval_params(state)
    return jax.lax.map(partial(loss_at, state, x), batches).mean()


def sample(state: TrainState, start: bytes, length: int) -> str:
    """What the model at x writes, most likely byte by byte, after `start`."""
    logits_at = jax.jit(partial(state.apply_fn, {"params": sf_jax.eval_params(state)}))
    text = start
    for _ in range(length):
        window = np.frombuffer(text[-LENGTH:].rjust(LENGTH), np.uint8)
        text += bytes([int(logits_at(window[None].astype(np.int32))[0, -1].argmax())])
    return text.decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/char_lm_linen"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resume", action="store_true", help="from --out's last step")
    parser.add_argument("--smoke", action="store_true", help="tiny, for the tests")
    args = parser.parse_args()
    width, layers = (16, 1) if args.smoke else (WIDTH, LAYERS)
    steps = min(args.steps, 4) if args.smoke else args.steps

    train, validation = corpus.load(limit=20 if args.smoke else None)
    held_out = np.stack(
        [corpus.batch(validation, BATCH, LENGTH, seed=1, step=i) for i in range(4)]
    )
    net = Transformer(width, layers)
    state = TrainState.create(
        apply_fn=net.apply,
        params=jax.jit(net.init)(jax.random.key(0), held_out[0, :, :-1])["params"],
        tx=sf_jax.schedule_free_adamw(0.01, warmup_steps=100, weight_decay=0.01),
    )

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=2 if args.smoke else SAVE_EVERY
    )
    directory = (args.out / "checkpoints").resolve()
    with ocp.CheckpointManager(directory, options=options) as manager:
        latest = manager.latest_step()
        if latest is not None and not args.resume:
            parser.error(f"{directory} holds a run: --resume it, or choose an --out")
        if latest is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            print(f"resumed after step {latest}")
        with tqdm(total=steps, initial=int(state.step), unit="step") as bar:
            for step in range(int(state.step), steps):
                batch = corpus.batch(train, BATCH, LENGTH, seed=0, step=step)
                state, loss = train_step(state, batch)
                bar.update()
                last = step + 1 == steps
                if (step + 1) % EVALUATE_EVERY == 0 or last:
                    loss_at_x = validate(state, held_out)
                    bar.write(
                        f"step {step + 1:5d}   training loss at y {loss:.3f}"
                        f"   validation loss at x {loss_at_x:.3f}"
                    )
                # The whole train state: y, z and the rest. x follows from it.
                manager.save(step + 1, args=ocp.args.StandardSave(state), force=last)
        manager.wait_until_finished()
    print(sample(state, b"def ", 20 if args.smoke else 300))


if __name__ == "__main__":
    main()
