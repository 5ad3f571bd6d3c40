"""Schedule-Free AdamW in the shape of an AlgoPerf submission, in JAX.

    python examples/algoperf_submission.py --smoke [--out out/algoperf]

The functions of a submission (``init_optimizer_state``, ``update_params``,
``get_batch_size``, ``data_selection``) with the entry that won the self-tuning track:
r = 0.75, b2 = 0.9955, decay at x, and a warmup over 2% of 0.75 of the step hint. The
benchmark evaluates the parameters that ``update_params`` returns, so those are x; the
gradients are taken at y, which the state gives back.

The benchmark need not be installed: ``--smoke`` trains on a workload of this file
that has as much of its interface as a submission uses, and writes losses.json.
"""

import argparse
import enum
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sf_jax

try:
    from algoperf.spec import ForwardPassMode
except ImportError:

    class ForwardPassMode(enum.Enum):  # type: ignore[no-redef]
        TRAIN = 0


LEARNING_RATE = 0.0025
WEIGHT_DECAY = 0.08121616522670176
B1, B2 = 0.9, 0.9955159689799007
R = 0.75
HORIZON_FRACTION, WARMUP_FRACTION = 0.75, 0.02


def init_optimizer_state(
    workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
) -> tuple[Any, Callable[..., Any]]:
    """The state, and the jitted step that goes with it."""
    tx = sf_jax.schedule_free_adamw(
        LEARNING_RATE,
        warmup_steps=int(WARMUP_FRACTION * HORIZON_FRACTION * workload.step_hint),
        b1=B1,
        b2=B2,
        weight_decay=WEIGHT_DECAY,
        r=R,
        variant="algoperf",
        store_x=True,  # then y comes from x and z without a loss of digits
    )
    return tx.init(model_params), jax.jit(functools.partial(_step, workload, tx))


def _step(
    workload: Any,
    tx: optax.GradientTransformation,
    state: Any,
    x: Any,
    model_state: Any,
    batch: Any,
    rng: Any,
) -> tuple[Any, Any, Any, jax.Array]:
    def loss_at(y: Any) -> tuple[jax.Array, Any]:
        logits, new_model_state = workload.model_fn(
            y, batch, model_state, ForwardPassMode.TRAIN, rng, update_batch_norm=True
        )
        losses = workload.loss_fn(
            batch["targets"], logits, batch.get("weights"), label_smoothing=0.0
        )
        loss = losses["summed"] / losses["n_valid_examples"]
        return loss, new_model_state

    y = sf_jax.train_params(state, x)
    (loss, model_state), grads = jax.value_and_grad(loss_at, has_aux=True)(y)
    updates, state = tx.update(grads, state, y)
    x = sf_jax.eval_params(state, optax.apply_updates(y, updates))
    return state, x, model_state, loss


def update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Any,
    loss_type: Any,
    optimizer_state: tuple[Any, Callable[..., Any]],
    eval_results: Any,
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[Any, Any, Any]:
    """One step: the state, x and the model's state after it."""
    state, step = optimizer_state
    state, x, model_state, _ = step(
        state, current_param_container, model_state, batch, rng
    )
    return (state, step), x, model_state


def get_batch_size(workload_name: str) -> int:
    """Examples a batch; the benchmark's workloads by name."""
    return {
        "criteo1tb": 262_144,
        "fastmri": 32,
        "imagenet_resnet": 1024,
        "imagenet_vit": 1024,
        "librispeech_conformer": 256,
        "librispeech_deepspeech": 256,
        "ogbg": 512,
        "wmt": 128,
    }[workload_name]


def data_selection(
    workload: Any,
    input_queue: Iterator[Any],
    optimizer_state: Any,
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> Any:
    return next(input_queue)


# A workload of our own


class Lines:
    """Linear regression, with what a submission uses of a workload."""

    step_hint = 400

    def model_fn(
        self,
        params: Any,
        batch: Any,
        model_state: Any,
        mode: ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
    ) -> tuple[jax.Array, Any]:
        return batch["inputs"] @ params["kernel"] + params["bias"], model_state

    def loss_fn(
        self, targets: Any, logits: Any, weights: Any, label_smoothing: float
    ) -> dict[str, jax.Array]:
        per_example = jnp.mean((logits - targets) ** 2, axis=-1)
        return {
            "summed": per_example.sum(),
            "n_valid_examples": jnp.asarray(len(targets)),
            "per_example": per_example,
        }

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        kernel = rng.normal(size=(5, 2))
        while True:
            inputs = rng.normal(size=(16, 5))
            targets = 0.3 * inputs @ kernel + 0.01 * rng.normal(size=(16, 2))
            yield {
                "inputs": inputs.astype(np.float32),
                "targets": targets.astype(np.float32),
            }


def smoke() -> list[float]:
    """Losses at x, as the benchmark would measure them."""
    workload, hyperparameters, rng = Lines(), SimpleNamespace(), jax.random.key(0)
    x: Any = {"kernel": jnp.zeros((5, 2)), "bias": jnp.zeros(2)}
    model_state: Any = None
    optimizer_state: Any = init_optimizer_state(
        workload, x, model_state, hyperparameters, rng
    )
    queue, losses = workload.batches(), []
    held_out = next(queue)
    for step in range(workload.step_hint):
        batch = data_selection(
            workload, queue, optimizer_state, x, None, hyperparameters, step, rng
        )
        optimizer_state, x, model_state = update_params(
            workload,
            x,
            None,
            model_state,
            hyperparameters,
            batch,
            "mean_squared_error",
            optimizer_state,
            [],
            step,
            rng,
        )
        if (step + 1) % 100 == 0:
            logits, _ = workload.model_fn(
                x, held_out, None, ForwardPassMode.TRAIN, rng, False
            )
            found = workload.loss_fn(held_out["targets"], logits, None, 0.0)
            losses.append(float(found["summed"] / found["n_valid_examples"]))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="train on Lines")
    parser.add_argument("--out", type=Path, default=Path("out/algoperf"))
    arguments = parser.parse_args()
    if not arguments.smoke:
        parser.error(
            "this file is for the benchmark's submission_runner.py, by "
            "--submission_path. Give --smoke to try it on a workload of its own."
        )
    losses = smoke()
    print("loss at x, every 100 steps:", ", ".join(f"{loss:.4f}" for loss in losses))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "losses.json"
    path.write_text(json.dumps(losses))
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
