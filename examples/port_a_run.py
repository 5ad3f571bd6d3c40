"""Train in PyTorch, stop halfway, and go on in Flax: the same run, in either.

    python examples/port_a_run.py [--smoke] [--out out/port]

The digits network is trained in PyTorch. Halfway its state dicts become a Flax train
state, and from that point the run goes on in both frameworks, over the same batches:
once each on gradients of its own, once both on the gradients that PyTorch recorded.
On equal gradients the two stay within a few ulps: the optimizers are the same. On
their own gradients they drift apart, because the two networks round differently and
training amplifies it; both end at the same accuracy.

Writes port.png and summary.json.
"""

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import sf_jax
import sf_torch
from digits import (
    Data,
    TrainState,
    by_name,
    distance,
    flax_accuracy,
    flax_start,
    flax_step,
    load,
    torch_accuracy,
    torch_optimizer,
    torch_step,
)
from digits_nets import TorchNet, torch_layout
from digits_report import LIMIT_ULPS, STYLE
from sf_jax import torch_checkpoint

BEFORE, AFTER = 200, 200  # steps; the warmup is 50


def batches(data: Data) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return itertools.chain.from_iterable(map(data.batches, itertools.count(1)))


def port(
    model: TorchNet, optimizer: sf_torch.AdamWScheduleFree, state: TrainState
) -> TrainState:
    """The PyTorch run in the structure of a Flax train state."""
    run = torch_checkpoint.from_torch(
        model.state_dict(),
        optimizer.state_dict(),
        state.params,
        state.opt_state,
        batch_stats=state.batch_stats,
    )
    return state.replace(
        step=int(run.opt_state.count),
        params=run.params,
        opt_state=run.opt_state,
        batch_stats=run.batch_stats,
    )


def flax_gradients(
    model: TorchNet, names: list[torch_checkpoint.Leaf], params: Any
) -> Any:
    """PyTorch's gradients, laid out as Flax's parameters."""
    grads = {n: p.grad.numpy() for n, p in model.named_parameters()}  # type: ignore
    row_of = {row.jax: row for row in names}

    def of_leaf(path: Any, leaf: jax.Array) -> np.ndarray:
        row = row_of["/".join(entry.key for entry in path)]
        return row.to_jax(grads[row.torch], leaf.shape)  # type: ignore[index]

    return jax.tree.map_with_path(of_leaf, params)


def apart(state: TrainState, model: TorchNet, x: list[torch.Tensor]) -> float:
    """The worse of the distances of y and of x, in ulps."""
    ours = state.params, sf_jax.eval_params(state)
    theirs = model.parameters(), x
    return max(
        distance(torch_layout(a), by_name(model, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def write_figure(path: Path, before: int, own: list[float], fed: list[float]) -> None:
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        steps = before + 1 + np.arange(len(own))
        for distances, label, colour in (
            (own, "gradients of each framework's own", "#b3b8c0"),
            (fed, "equal gradients", "#12897b"),
        ):
            # Zero has no place on a log scale.
            ax.plot(steps, np.maximum(distances, 0.1), color=colour, label=label)
        ax.axhline(LIMIT_ULPS, color="#b4232a", lw=1, ls=(0, (2, 2)), label="limit")
        ax.set_yscale("log")
        ax.set(
            title="One run in Flax and in PyTorch, after the move",
            xlabel="step",
            ylabel=r"y and x apart, in $2^{-23}\,\max(1, \max|w|)$",
        )
        ax.legend()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/port"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, for tests")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    before, after = (6, 6) if args.smoke else (BEFORE, AFTER)

    data = load()
    stream = batches(data)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is too small to be shared out
    model = TorchNet()
    optimizer = torch_optimizer(model.parameters())
    model.train()
    optimizer.train()
    for images, labels in tqdm(itertools.islice(stream, before), "PyTorch", before):
        torch_step(model, optimizer, images, labels)

    structure = flax_start(data)
    names = torch_checkpoint.guess_names(
        model.state_dict(), structure.params, structure.batch_stats
    )
    print("Halfway. What becomes what:", *names, sep="\n  ")
    state, equal = (port(model, optimizer, structure) for _ in range(2))
    ported = apart(state, model, optimizer.eval_params())

    @partial(jax.jit, donate_argnums=0)
    def apply_gradients(state: TrainState, grads: Any) -> TrainState:
        return state.apply_gradients(grads=grads)

    own, fed = [], []
    for images, labels in tqdm(itertools.islice(stream, after), "both", after):
        torch_step(model, optimizer, images, labels)
        state, _, _ = flax_step(state, images, labels)
        equal = apply_gradients(equal, flax_gradients(model, names, equal.params))
        x = optimizer.eval_params()
        own.append(apart(state, model, x))
        fed.append(apart(equal, model, x))

    fixed = np.stack([images for images, _ in data.batches(epoch=0)])
    test = (data.test_images, data.test_labels)
    summary = {
        "steps": [before, after],
        "ulps_when_ported": ported,
        "max_ulps_equal_gradients": max(fed),
        "max_ulps_own_gradients": max(own),
        "flax_accuracy": float(flax_accuracy(state, fixed, *test)),
        "torch_accuracy": torch_accuracy(model, optimizer, fixed, *test),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{os.cpu_count()}-core {platform.machine()}",
    }
    write_figure(args.out / "port.png", before, own, fed)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"\n{after} steps after the move, at worst\n"
        f"  equal gradients       {max(fed):8.1f} ulps apart (limit {LIMIT_ULPS})\n"
        f"  gradients of its own  {max(own):8.0f} ulps apart: the networks' rounding\n"
        f"accuracy at x           Flax {summary['flax_accuracy']:.4f}, "
        f"PyTorch {summary['torch_accuracy']:.4f}\n\n"
        f"wrote {args.out / 'port.png'}\nwrote {args.out / 'summary.json'}"
    )
    if max(fed) > LIMIT_ULPS:
        raise SystemExit("The optimizers part: that is a bug.")


if __name__ == "__main__":
    main()
