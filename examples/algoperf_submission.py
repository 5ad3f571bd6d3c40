"""Schedule-Free AdamW as a submission to AlgoPerf, in JAX: either published entry.

    python examples/algoperf_submission.py --smoke [--out out/algoperf]

The benchmark's ``submission_runner.py`` takes this file as it is, in the self-tuning
ruleset; docs/algoperf.md has the command. ``ALGOPERF_ENTRY=newer`` in the environment
chooses the second of the two entries (mlcommons/submissions_algorithms):

``first``   schedule_free_adamw, the winner of 2024. r = 0.75, decay at x, v in
            bfloat16. Where validation stays where it began, it starts again from the
            initial weights with half the step size.
``newer``   schedule_free_adamw_v2. r = 0, decay at y, v in float32. BatchNorm
            statistics are taken at x, at every third step.

The benchmark evaluates the parameters that ``update_params`` returns, so those are x.
Gradients are taken at y, which x and the state's z give. The state here lacks x: it is
the parameters, and memory is that of AdamW.

The benchmark need not be installed: ``--smoke`` trains on a workload of this file that
has as much of its interface as a submission uses, and writes losses.json.
"""

import argparse
import dataclasses
import enum
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

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
        EVAL = 1


LEARNING_RATE = 0.0025
WEIGHT_DECAY = 0.08121616522670176
B1, B2 = 0.9, 0.9955159689799007
LABEL_SMOOTHING = 0.2
HORIZON_FRACTION, WARMUP_FRACTION = 0.75, 0.02


@dataclasses.dataclass(frozen=True)
class Entry:
    """In what the two entries differ."""

    variant: str
    r: float
    moment_dtype: Any
    starts_again: bool
    statistics_at_x: bool


ENTRIES = {
    "first": Entry("algoperf", 0.75, jnp.bfloat16, True, False),
    "newer": Entry("algoperf_v2", 0.0, None, False, True),
}
ENTRY = ENTRIES[os.environ.get("ALGOPERF_ENTRY", "first")]

BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 16,
    "imagenet_resnet": 1024,
    "imagenet_resnet_gelu": 512,
    "imagenet_resnet_silu": 512,
    "imagenet_vit": 1024,
    "librispeech_conformer": 224,
    "librispeech_deepspeech": 128,
    "mnist": 16,
    "ogbg": 512,
    "wmt": 128,
}


class State(NamedTuple):
    """What the benchmark's checkpoints keep of a submission."""

    optimizer: sf_jax.ScheduleFreeState  # without x, which is the parameters
    learning_rate: jax.Array  # () float32
    evaluations: np.ndarray  # () int32: how many were looked at for a divergence
    start: Any  # like params, on the host: where an entry that diverged starts again


class Compiled(NamedTuple):
    """What is compiled for a workload."""

    step: Callable[..., Any]
    statistics: Callable[..., Any]
    whole: jax.sharding.Sharding  # where all but batches lie: on each device


def optimizer(
    workload: Any, learning_rate: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the entry."""
    return sf_jax.schedule_free_adamw(
        learning_rate,
        warmup_steps=int(WARMUP_FRACTION * HORIZON_FRACTION * workload.step_hint),
        b1=B1,
        b2=B2,
        weight_decay=WEIGHT_DECAY,
        r=ENTRY.r,
        variant=ENTRY.variant,
        moment_dtype=ENTRY.moment_dtype,
        store_x=True,  # then y comes from x and z without a loss of digits
    )


def begin(workload: Any, x: Any) -> sf_jax.ScheduleFreeState:
    """The optimizer's state before the first step, without x."""
    state = optimizer(workload, LEARNING_RATE).init(x)
    return state._replace(x=optax.MaskedNode())


def init_optimizer_state(
    workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
) -> tuple[State, Compiled]:
    """The state, and the programs that go with it."""
    state = State(
        begin(workload, model_params),
        jnp.asarray(LEARNING_RATE, jnp.float32),
        np.zeros((), np.int32),
        jax.tree.map(np.array, model_params) if ENTRY.starts_again else (),
    )
    # The benchmark spreads batches over all devices; everything else is on each.
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(
        functools.partial(_step, workload),
        in_shardings=(whole, whole, whole, whole, spread, whole),
        out_shardings=whole,
        donate_argnums=(0, 1, 2),
    )
    statistics = jax.jit(
        functools.partial(_statistics, workload),
        in_shardings=(whole, whole, spread, whole),
        out_shardings=whole,
    )
    return state, Compiled(step, statistics, whole)


def _step(
    workload: Any,
    x: Any,
    state: sf_jax.ScheduleFreeState,
    model_state: Any,
    learning_rate: jax.Array,
    batch: Any,
    rng: Any,
) -> tuple[Any, sf_jax.ScheduleFreeState, Any]:
    def loss_at(y: Any) -> tuple[jax.Array, Any]:
        # With update_batch_norm=False some of the JAX workloads would normalise by the
        # running statistics, and the gradients would be others than PyTorch's.
        logits, new_model_state = workload.model_fn(
            y, batch, model_state, ForwardPassMode.TRAIN, rng, update_batch_norm=True
        )
        losses = workload.loss_fn(
            batch["targets"],
            logits,
            batch.get("weights"),
            label_smoothing=LABEL_SMOOTHING,
        )
        return losses["summed"] / losses["n_valid_examples"], new_model_state

    state = state._replace(x=x)
    y = sf_jax.train_params(state, x)
    grads, new_model_state = jax.grad(loss_at, has_aux=True)(y)
    _, state = optimizer(workload, learning_rate).update(grads, state, y)
    if ENTRY.statistics_at_x:
        new_model_state = model_state
    return state.x, state._replace(x=optax.MaskedNode()), new_model_state


def _statistics(workload: Any, x: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    """The model's state after a batch at x."""
    _, model_state = workload.model_fn(
        x, batch, model_state, ForwardPassMode.TRAIN, rng, update_batch_norm=True
    )
    return model_state


def has_diverged(workload: Any, eval_results: Sequence[tuple[int, Any]]) -> bool:
    """Whether validation is no better than at first, and was not for four times."""
    name = workload.target_metric_name
    sign = -1 if name in ("loss", "wer") else 1
    found = [sign * result[f"validation/{name}"] for _, result in eval_results]
    gains = [found[-1] - found[0]] + [b - a for a, b in itertools.pairwise(found[-4:])]
    return len(found) >= 4 and max(gains) < 0.01


def update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Any,
    loss_type: Any,
    optimizer_state: tuple[State, Compiled],
    eval_results: Sequence[tuple[int, Any]],
    global_step: int,
    rng: Any,
) -> tuple[Any, Any, Any]:
    """One step: the state, x and the model's state after it."""
    (state, compiled), x = optimizer_state, current_param_container
    if (
        ENTRY.starts_again
        and global_step > 0.1 * workload.step_hint
        and len(eval_results) > state.evaluations
    ):
        state = state._replace(evaluations=np.array(len(eval_results), np.int32))
        if has_diverged(workload, eval_results):
            x = jax.tree.map(jnp.array, state.start)
            state = state._replace(
                optimizer=begin(workload, x), learning_rate=state.learning_rate / 2
            )
    if ENTRY.statistics_at_x and global_step % 3 == 0 and jax.tree.leaves(model_state):
        model_state = compiled.statistics(x, model_state, batch, rng)
    # Nothing moves but at a start; there the step would be compiled once more.
    placed = jax.device_put((x, state.optimizer, model_state), compiled.whole)
    x, after, model_state = compiled.step(*placed, state.learning_rate, batch, rng)
    return (state._replace(optimizer=after), compiled), x, model_state


def get_batch_size(workload_name: str) -> int:
    """Examples a batch, by the name of a workload.

    Raises:
      ValueError: the name is not in the table. The benchmark then asks for the workload
        that it is a variant of: "criteo1tb" for "criteo1tb_test".
    """
    if workload_name not in BATCH_SIZES:
        raise ValueError(
            f"no batch size for the workload {workload_name!r}. Add it to BATCH_SIZES, "
            f"which has {', '.join(BATCH_SIZES)}."
        )
    return BATCH_SIZES[workload_name]


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
    target_metric_name = "loss"

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
        self,
        label_batch: Any,
        logits_batch: Any,
        mask_batch: Any = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, jax.Array]:
        per_example = jnp.mean((logits_batch - label_batch) ** 2, axis=-1)
        return {
            "summed": per_example.sum(),
            "n_valid_examples": jnp.asarray(len(label_batch)),
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
    queue = workload.batches()
    eval_results: list[tuple[int, dict[str, float]]] = []
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
            eval_results,
            step,
            rng,
        )
        if (step + 1) % 100 == 0:
            logits, _ = workload.model_fn(
                x, held_out, None, ForwardPassMode.EVAL, rng, False
            )
            found = workload.loss_fn(held_out["targets"], logits)
            loss = float(found["summed"] / found["n_valid_examples"])
            eval_results.append((step + 1, {"validation/loss": loss}))
    return [result["validation/loss"] for _, result in eval_results]


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
