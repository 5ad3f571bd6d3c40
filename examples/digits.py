"""Train one network on scikit-learn's digits in Flax and in PyTorch, side by side.

    make demo
    python examples/digits.py [--smoke] [--out out/demo]

Both start from the same weights and see the same batches. While they train, the loss
is taken at y, where the gradients are, and the accuracy at x, the weights that you
ship; BatchNorm's statistics are recomputed for x. Then both optimizers are fed the
gradients that the Flax run recorded, which takes the networks' own rounding out of
the comparison, and y, x and z are held against each other at every step.

Writes report.html, curves.png, summary.json, torch.pt and flax.msgpack.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import optax
import torch
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import sf_jax.flax
import sf_torch
from digits_nets import FlaxNet, TorchNet, torch_layout
from digits_report import Record, write_figure, write_report

SEED = 0
EPOCHS = 20
BATCH = 64
LEARNING_RATE = 0.01  # ten times what AdamW would usually be given
WARMUP_STEPS = 50
B1, B2 = 0.9, 0.999
WEIGHT_DECAY = 1e-3


@dataclass
class Data:
    """Images (n, 8, 8, 1) in [0, 1] and labels (n,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def batches(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The epoch's batches in an order that depends on the epoch alone."""
        order = np.random.default_rng([SEED, epoch]).permutation(len(self.train_labels))
        for at in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[at : at + BATCH]
            yield self.train_images[rows], self.train_labels[rows]


def load() -> Data:
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.2, random_state=SEED, stratify=labels
    )
    return Data(train_x, train_y, test_x, test_y)


# --- Flax -----------------------------------------------------------------------


class TrainState(train_state.TrainState):
    batch_stats: Any


def flax_optimizer() -> optax.GradientTransformationExtraArgs:
    return sf_jax.schedule_free_adamw(
        LEARNING_RATE, WARMUP_STEPS, b1=B1, b2=B2, weight_decay=WEIGHT_DECAY
    )


def flax_start(data: Data) -> TrainState:
    net = FlaxNet()
    variables = net.init(jax.random.key(SEED), data.train_images[:1], train=False)
    return TrainState.create(
        apply_fn=net.apply,
        params=variables["params"],
        tx=flax_optimizer(),
        batch_stats=variables["batch_stats"],
    )


@partial(jax.jit, donate_argnames="state")
def flax_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array, Any]:
    """One step; also returns the loss at y and the gradient there."""

    def loss_at(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_at, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss, grads


@jax.jit
def flax_accuracy(
    state: TrainState, batches: jax.Array, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Accuracy at x, with BatchNorm's statistics taken at x over `batches`."""
    at_x = sf_jax.flax.eval_variables(state, batches, train=True)
    logits = state.apply_fn(at_x, images, train=False)
    return (logits.argmax(-1) == labels).mean()


# --- PyTorch --------------------------------------------------------------------


def torch_images(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def torch_optimizer(params: Any) -> sf_torch.AdamWScheduleFree:
    return sf_torch.AdamWScheduleFree(
        params,
        lr=LEARNING_RATE,
        betas=(B1, B2),
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
    )


def torch_start(
    weights: dict[str, np.ndarray],
) -> tuple[TorchNet, sf_torch.AdamWScheduleFree]:
    model = TorchNet()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name].copy()))
    optimizer = torch_optimizer(model.parameters())
    model.train()
    optimizer.train()
    return model, optimizer


def torch_step(
    model: TorchNet,
    optimizer: sf_torch.AdamWScheduleFree,
    images: np.ndarray,
    labels: np.ndarray,
) -> torch.Tensor:
    """One step; returns the loss at y."""
    logits = model(torch_images(images))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def torch_accuracy(
    model: TorchNet,
    optimizer: sf_torch.AdamWScheduleFree,
    batches: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
) -> float:
    """Accuracy at x, with BatchNorm's statistics taken at x over `batches`."""
    loader = [torch_images(batch) for batch in batches]
    sf_torch.update_bn(loader, model, optimizer)
    model.eval()
    with optimizer.eval_mode(), torch.no_grad():
        guess = model(torch_images(images)).argmax(-1).numpy()
    model.train()
    return float((guess == labels).mean())


# --- Both -----------------------------------------------------------------------


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Worst distance over all leaves, in units of 2^-23 max(1, max|w|) of the leaf."""
    return max(
        float(np.abs(ours[name] - theirs[name]).max())
        / (2.0**-23 * max(1.0, float(np.abs(ours[name]).max())))
        for name in ours
    )


def by_name(model: TorchNet, tensors: Any) -> dict[str, np.ndarray]:
    names = [name for name, _ in model.named_parameters()]
    return {
        name: tensor.detach().numpy()
        for name, tensor in zip(names, tensors, strict=True)
    }


def train(
    data: Data, epochs: int, batches_per_epoch: int, record: Record
) -> tuple[TrainState, TorchNet, sf_torch.AdamWScheduleFree, list[Any]]:
    """Trains both, fills `record`; the gradients of the Flax run come back too."""
    state = flax_start(data)
    model, optimizer = torch_start(torch_layout(state.params))
    fixed = np.stack([images for images, _ in data.batches(epoch=0)])
    test = (data.test_images, data.test_labels)
    gradients = []

    bar = tqdm(total=epochs * batches_per_epoch, unit="step", dynamic_ncols=True)
    bar.write("          loss at y           accuracy at x")
    bar.write("epoch     Flax    PyTorch     Flax    PyTorch")
    for epoch in range(1, epochs + 1):
        flax_losses, torch_losses = [], []
        for images, labels in list(data.batches(epoch))[:batches_per_epoch]:
            state, flax_loss, grads = flax_step(state, images, labels)
            torch_loss = torch_step(model, optimizer, images, labels)
            gradients.append(jax.tree.map(np.array, grads))
            flax_losses.append(float(flax_loss))
            torch_losses.append(float(torch_loss))
            y = by_name(model, model.parameters())
            record.own_gradients.append(distance(torch_layout(state.params), y))
            bar.update()
        record.flax_loss += flax_losses
        record.torch_loss += torch_losses
        record.flax_accuracy.append(float(flax_accuracy(state, fixed, *test)))
        record.torch_accuracy.append(torch_accuracy(model, optimizer, fixed, *test))
        bar.write(
            f"{epoch:5d}   {np.mean(flax_losses):.4f}     {np.mean(torch_losses):.4f}"
            f"   {record.flax_accuracy[-1]:.4f}     {record.torch_accuracy[-1]:.4f}"
        )
    bar.close()
    return state, model, optimizer, gradients


def replay(data: Data, gradients: list[Any], record: Record) -> None:
    """Feeds both optimizers the same gradients and notes how far y, x and z part."""
    params = flax_start(data).params
    model, optimizer = torch_start(torch_layout(params))
    tx = flax_optimizer()
    opt_state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    x_of = jax.jit(sf_jax.eval_params)
    for grads in tqdm(gradients, desc="equal gradients", unit="step"):
        params, opt_state = step(params, opt_state, grads)
        named_grads = torch_layout(grads)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(named_grads[name].copy())
        optimizer.step()
        theirs = {
            "y": model.parameters(),
            "x": optimizer.eval_params(),
            "z": [optimizer.state[p]["z"] for p in model.parameters()],
        }
        ours = {
            "y": params,
            "x": x_of(opt_state, params),
            "z": optax.tree.get(opt_state, "z"),
        }
        for name in "yxz":
            far = distance(torch_layout(ours[name]), by_name(model, theirs[name]))
            record.equal_gradients[name].append(far)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--smoke", action="store_true", help="six steps, for the tests")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    data = load()
    epochs = 2 if args.smoke else EPOCHS
    per_epoch = 3 if args.smoke else len(data.train_labels) // BATCH
    record = Record(steps_per_epoch=per_epoch)
    state, model, optimizer, gradients = train(data, epochs, per_epoch, record)
    replay(data, gradients, record)

    sf_torch.save_checkpoint(args.out / "torch.pt", model, optimizer, epoch=epochs)
    weights = flax.serialization.to_bytes(state)
    (args.out / "flax.msgpack").write_bytes(weights)

    summary = {
        "jax_eval_accuracy": record.flax_accuracy[-1],
        "torch_eval_accuracy": record.torch_accuracy[-1],
        **{f"max_ulps_{n}": max(record.equal_gradients[n]) for n in "xyz"},
        "steps": len(gradients),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{os.cpu_count()}-core {platform.machine()}",
        "optimizer": {
            "learning_rate": LEARNING_RATE,
            "warmup_steps": WARMUP_STEPS,
            "b1": B1,
            "b2": B2,
            "weight_decay": WEIGHT_DECAY,
        },
        "versions": {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "torch": torch.__version__,
        },
    }
    write_figure(args.out / "curves.png", record)
    write_report(args.out / "report.html", record, summary)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    print(
        f"\naccuracy at x      Flax {summary['jax_eval_accuracy']:.4f}, "
        f"PyTorch {summary['torch_eval_accuracy']:.4f}\n"
        f"equal gradients    y {summary['max_ulps_y']:.1f}, "
        f"x {summary['max_ulps_x']:.1f}, z {summary['max_ulps_z']:.1f} "
        f"ulps apart at the worst of {summary['steps']} steps\n"
    )
    for name in ("report.html", "curves.png", "summary.json", "torch.pt"):
        print(f"wrote {args.out / name}")
    print(f"wrote {args.out / 'flax.msgpack'}")


if __name__ == "__main__":
    main()
