"""A stretch of training on scikit-learn's digits, as AlgoPerf's entries take it.

    python -m parity_tests.runners.digits_stretch --first PATH --newer PATH

The network of AlgoPerf's ``mnist`` workload, with fewer units: one hidden layer of
sigmoids, cross entropy with label smoothing, batches of 16. Whoever trains on it
differentiates it at an own y, so that a difference grows as it does in a real run.

The command runs the published entries themselves, and writes their x at every
:data:`EVERY` steps into ``golden/algoperf_digits.npz``. PATH is the ``submission.py``
of ``schedule_free_adamw`` and of ``schedule_free_adamw_v2`` in the self-tuning
submissions of https://github.com/mlcommons/submissions_algorithms.
"""

import argparse
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional

STEPS, EVERY = 300, 50
STEP_HINT = 7813  # of the ``mnist`` workload; 117 steps of it are warmup
BATCH, HIDDEN, CLASSES = 16, 16, 10
RECORDED = Path(__file__).parents[1] / "golden" / "algoperf_digits.npz"

Leaves = dict[str, np.ndarray]


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images of shape (1797, 64) in float32, standardised, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    return images.astype(np.float32), labels.astype(np.int32)


def batches() -> Iterator[dict[str, np.ndarray]]:
    """The batches of all steps, in order."""
    images, labels = digits()
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = rng.integers(len(labels), size=BATCH)
        yield {"inputs": images[chosen], "targets": labels[chosen]}


def initial() -> Leaves:
    """The weights before the first step, kernels as (inputs, outputs)."""
    rng = np.random.default_rng(1)
    sizes = {"1": (64, HIDDEN), "2": (HIDDEN, CLASSES)}
    leaves = {}
    for layer, (inputs, outputs) in sizes.items():
        kernel = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
        leaves[f"kernel{layer}"] = kernel.astype(np.float32)
        leaves[f"bias{layer}"] = np.zeros(outputs, np.float32)
    return leaves


def network() -> nn.Sequential:
    """The network in PyTorch, with the initial weights."""
    model = nn.Sequential(
        nn.Linear(64, HIDDEN), nn.Sigmoid(), nn.Linear(HIDDEN, CLASSES)
    )
    with torch.no_grad():
        for name, leaf in initial().items():
            _parameter(model, name).copy_(torch.as_tensor(leaf.T))
    return model


def _parameter(model: nn.Sequential, name: str) -> torch.Tensor:
    layer: Any = model[0 if name.endswith("1") else 2]
    return layer.weight if name.startswith("kernel") else layer.bias


def weights(model: nn.Sequential) -> Leaves:
    """What the network holds now, as :func:`initial` names it."""
    return {n: _parameter(model, n).detach().numpy().T.copy() for n in initial()}


class TorchWorkload:
    """What an entry uses of a workload in PyTorch."""

    step_hint = STEP_HINT
    target_metric_name = "accuracy"

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, torch.Tensor],
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
    ) -> tuple[torch.Tensor, Any]:
        return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(
        self,
        label_batch: torch.Tensor,
        logits_batch: torch.Tensor,
        mask_batch: Any = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Any]:
        loss = functional.cross_entropy(
            logits_batch,
            label_batch,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        return {"summed": loss, "n_valid_examples": len(label_batch)}


def in_torch(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        "inputs": torch.as_tensor(batch["inputs"]),
        "targets": torch.as_tensor(batch["targets"]).long(),
    }


def distance(ours: Leaves, theirs: Leaves, path: float) -> float:
    """How far two weights are apart, relative to the length of a path."""
    squares = (np.sum((ours[n].astype(float) - theirs[n]) ** 2) for n in theirs)
    return float(np.sqrt(sum(squares))) / path


# The published entries


def entry(path: Path) -> types.ModuleType:
    """A published submission as a module, without the benchmark that it imports."""
    benchmark = mock.MagicMock()
    benchmark.pytorch_utils.pytorch_setup.return_value = (False, 0, "cpu", 0)
    module = types.ModuleType("entry")
    names = {
        f"{package}{part}": functools.reduce(getattr, part.split(".")[1:], benchmark)
        for package in ("algoperf", "algorithmic_efficiency")
        for part in ("", ".spec", ".pytorch_utils")
    }
    with mock.patch.dict(sys.modules, {**names, "absl": mock.MagicMock()}):
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module


def published(
    module: types.ModuleType, prepare: Callable[[Any], None] = lambda optimizer: None
) -> Iterator[Leaves]:
    """x after every step of a published submission.

    Args:
      prepare: gets its optimizer before the first step.
    """
    workload, model = TorchWorkload(), network()
    state = module.init_optimizer_state(workload, model, None, None, None)
    prepare(state["optimizer"])
    for step, batch in enumerate(batches()):
        state, model, _ = module.update_params(
            workload, model, None, None, None, in_torch(batch), None, state, [], step, 0
        )
        yield weights(model)


def with_float32_v(optimizer: Any) -> None:
    """The state that the first entry would make, but for the dtype of v."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "z": p.detach().clone(),
                "exp_avg_sq": torch.zeros_like(p),
                "x0": p.detach().clone(),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--newer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RECORDED)
    arguments = parser.parse_args()
    first, newer = entry(arguments.first), entry(arguments.newer)
    runs = {
        "first": published(first),
        "first_float32_v": published(first, with_float32_v),
        "newer": published(newer),
    }
    found: dict[str, Any] = {}
    for run, xs in runs.items():
        before, path = initial(), 0.0
        for step, x in enumerate(xs, 1):
            path += distance(x, before, 1.0)
            before = x
            if step % EVERY == 0:
                found |= {f"{run}/{step}/{name}": leaf for name, leaf in x.items()}
                found[f"{run}/{step}/path"] = path
    np.savez_compressed(arguments.out, **found)
    print(f"Written: {arguments.out}")


if __name__ == "__main__":
    main()
