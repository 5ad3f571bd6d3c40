"""The published AlgoPerf entries, in full runs of their own on the digits.

``golden/algoperf_digits.npz`` holds x of the entries' own PyTorch code, run by
``parity_tests.runners.digits_stretch``. sf_torch takes the same steps here, and so does
sf_jax, through the functions of ``examples/algoperf_submission.py``.
"""

import dataclasses
import functools
import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sf_torch
from parity_tests.compare import tolerances
from parity_tests.runners import digits_stretch as stretch

RUNS = ("first", "first_float32_v", "newer")
SUBMISSION = Path(__file__).parents[1] / "examples" / "algoperf_submission.py"


def submission(run: str) -> Any:
    """The example, as a module of its own that makes the entry of this run."""
    spec = importlib.util.spec_from_file_location("algoperf_submission", SUBMISSION)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ENTRY = module.ENTRIES[run.split("_")[0]]
    if run.endswith("float32_v"):
        module.ENTRY = dataclasses.replace(module.ENTRY, moment_dtype=None)
    return module


class JaxWorkload:
    """What the example uses of a workload, over the same network."""

    step_hint = stretch.STEP_HINT
    target_metric_name = "accuracy"

    def model_fn(
        self,
        p: Any,
        batch: Any,
        state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: Any,
    ) -> tuple[jax.Array, None]:
        hidden = jax.nn.sigmoid(batch["inputs"] @ p["kernel1"] + p["bias1"])
        return hidden @ p["kernel2"] + p["bias2"], None

    def loss_fn(
        self, labels: Any, logits: Any, mask: Any, label_smoothing: float
    ) -> dict[str, Any]:
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, stretch.CLASSES), label_smoothing
        )
        loss = -jnp.sum(targets * jax.nn.log_softmax(logits))
        return {"summed": loss, "n_valid_examples": len(labels)}


def in_jax(run: str) -> Iterator[stretch.Leaves]:
    module, workload = submission(run), JaxWorkload()
    x: Any = {name: jnp.asarray(leaf) for name, leaf in stretch.initial().items()}
    one = jax.devices()[:1]  # the tests have eight, which take longer
    with mock.patch.object(jax, "devices", return_value=one):
        state = module.init_optimizer_state(workload, x, None, None, None)
    for step, batch in enumerate(stretch.batches()):
        state, x, _ = module.update_params(
            workload, x, None, None, None, batch, None, state, [], step, None
        )
        yield {name: np.asarray(leaf) for name, leaf in x.items()}


def in_torch(run: str) -> Iterator[stretch.Leaves]:
    module, workload = submission(run), stretch.TorchWorkload()
    newer = run == "newer"
    model = stretch.network()
    classes = sf_torch.AdamWScheduleFreeAlgoPerf, sf_torch.AdamWScheduleFreeAlgoPerfV2
    optimizer = classes[newer](
        model.parameters(),
        lr=module.LEARNING_RATE,
        betas=(module.B1, module.B2),
        weight_decay=module.WEIGHT_DECAY,
        warmup_steps=int(0.02 * 0.75 * workload.step_hint),
        r=module.ENTRY.r,
        moment_dtype=torch.bfloat16 if run == "first" else None,
    )
    optimizer.train()
    for batch in map(stretch.in_torch, stretch.batches()):
        optimizer.zero_grad()
        losses = workload.loss_fn(
            batch["targets"],
            model(batch["inputs"]),
            label_smoothing=module.LABEL_SMOOTHING,
        )
        (losses["summed"] / losses["n_valid_examples"]).backward()
        optimizer.step()
        with optimizer.eval_mode():
            yield stretch.weights(model)


PACKAGES = {"sf_jax": in_jax, "sf_torch": in_torch}


@functools.cache
def xs(package: str, run: str) -> list[stretch.Leaves]:
    """x at the steps that are in the file."""
    return list(PACKAGES[package](run))[stretch.EVERY - 1 :: stretch.EVERY]


@functools.cache
def recorded() -> dict[str, np.ndarray]:
    with np.load(stretch.RECORDED) as file:
        return dict(file)


def farthest(package: str, run: str, from_run: str) -> float:
    """The largest distance relative to the path's length, over the steps."""
    file = recorded()
    found = []
    for i, x in enumerate(xs(package, run), 1):
        at = f"{from_run}/{i * stretch.EVERY}"
        theirs = {name: file[f"{at}/{name}"] for name in x}
        found.append(stretch.distance(x, theirs, float(file[f"{at}/path"])))
    assert len(found) == stretch.STEPS // stretch.EVERY
    return max(found)


pytestmark = pytest.mark.xdist_group("algoperf")  # runs are shared between tests


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are too small for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("package", PACKAGES)
def test_an_entry_goes_where_its_published_code_goes(package: str, run: str) -> None:
    limit = tolerances.ALGOPERF_BFLOAT16_V if run == "first" else tolerances.ALGOPERF
    assert farthest(package, run, run) <= limit


@pytest.mark.parametrize("package", PACKAGES)
def test_the_entries_are_not_one_another(package: str) -> None:
    for run in RUNS:
        for other in set(RUNS) - {run}:
            assert farthest(package, run, other) > 3 * tolerances.ALGOPERF_BFLOAT16_V


# What else the benchmark asks of the example


def test_batch_sizes_are_the_entrys_and_other_names_are_a_value_error() -> None:
    """The benchmark catches ``ValueError`` and asks for the base workload then."""
    module = submission("first")
    assert module.get_batch_size("librispeech_conformer") == 224
    assert module.get_batch_size("imagenet_resnet_gelu") == 512
    assert module.get_batch_size("mnist") == 16
    with pytest.raises(ValueError, match=r"'criteo1tb_test'.*Add it to BATCH_SIZES"):
        module.get_batch_size("criteo1tb_test")


class Counted:
    """Weights that sink; the state counts the passes that are kept, and where."""

    step_hint = 10
    target_metric_name = "accuracy"

    def model_fn(
        self,
        p: Any,
        batch: Any,
        state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: Any,
    ) -> tuple[jax.Array, Any]:
        kept = {"passes": state["passes"] + 1, "at": jax.lax.stop_gradient(p)}
        return jnp.sum(p), kept

    def loss_fn(
        self, labels: Any, logits: Any, mask: Any, label_smoothing: float
    ) -> dict[str, Any]:
        return {"summed": logits, "n_valid_examples": len(labels)}


def taken(run: str, steps: int, evaluations: Any = ()) -> tuple[Any, list[Any]]:
    """The last state, and (x, the workload's state) after each step."""
    module, workload, batch = submission(run), Counted(), {"targets": np.zeros(16)}
    x: Any = jnp.zeros(3)
    kept: Any = {"passes": jnp.zeros(()), "at": jnp.zeros(3)}
    state = module.init_optimizer_state(workload, x, kept, None, None)
    found = []
    for step in range(steps):
        state, x, kept = module.update_params(
            workload, x, None, kept, None, batch, None, state, evaluations, step, None
        )
        found.append(jax.tree.map(np.asarray, (x, kept)))
    return state[0], found


def test_the_newer_entry_takes_statistics_at_x_at_every_third_step() -> None:
    _, found = taken("newer", 5)
    assert [int(kept["passes"]) for _, kept in found] == [1, 1, 1, 2, 2]
    (x, _), (_, kept) = found[2], found[3]
    np.testing.assert_array_equal(kept["at"], x)


@pytest.mark.parametrize(
    ("accuracies", "stands"),
    [
        ((0.1, 0.1, 0.1, 0.1), True),
        ((0.1, 0.5, 0.1, 0.1, 0.1, 0.1), True),
        ((0.1, 0.1, 0.1, 0.12), False),  # better than at first
        ((0.1, 0.0, 0.05, 0.05), False),  # a gain among the last three
        ((0.1, 0.1, 0.1), False),
    ],
)
@pytest.mark.parametrize("metric", ["accuracy", "wer"])
def test_a_run_has_diverged_where_validation_stands_where_it_began(
    accuracies: tuple[float, ...], stands: bool, metric: str
) -> None:
    sign = -1 if metric == "wer" else 1
    found = [(k, {f"validation/{metric}": sign * a}) for k, a in enumerate(accuracies)]
    workload = types.SimpleNamespace(target_metric_name=metric)
    assert submission("first").has_diverged(workload, found) == stands


def test_the_first_entry_starts_again_with_half_the_step_size() -> None:
    evaluations = [(k, {"validation/accuracy": 0.1}) for k in range(4)]
    state, found = taken("first", 4, evaluations)
    # A tenth of ten steps is over at step 2, and each evaluation counts once.
    assert int(state.optimizer.count) == 2
    assert float(state.learning_rate) == pytest.approx(0.00125)
    # The first step again, from the same place, half as long.
    np.testing.assert_allclose(found[2][0], found[0][0] / 2, rtol=1e-6)
    # The workload's own state goes on.
    assert [int(kept["passes"]) for _, kept in found] == [1, 2, 3, 4]
