"""The comparison itself: what it must catch, and where it says the error is."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.compare import tolerances
from parity_tests.compare.distance import compare, curve
from parity_tests.reference import wide
from parity_tests.registry import CASES
from parity_tests.registry.case import Case
from parity_tests.registry.gradients import rounded
from parity_tests.runners.trajectory import Trajectory
from parity_tests.runners.voices import run

BY_NAME = {case.name: case for case in CASES}
VOICES = ("jax scan", "torch")


def caught(case: Case, changed: Trajectory, voice: str) -> bool:
    limit = tolerances.limit(case.dtype, "sf_jax", "reference").ulps
    assert compare(run(case, voice), run(case, "reference"), case.dtype).ulps <= limit
    return compare(changed, run(case, "reference"), case.dtype).ulps > limit


def with_options(case: Case, **options: Any) -> Case:
    changed = dataclasses.replace(case.options, **options)
    return dataclasses.replace(case, options=changed)


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize(
    "options",
    [{"b2": 0.99901}, {"warmup_steps": 21}, {"b1": 0.9001}, {"r": 1e-4}],
    ids=str,
)
def test_a_perturbed_option_is_caught(options: dict[str, float], voice: str) -> None:
    case = BY_NAME["adamw/warmup"]
    assert caught(case, run(with_options(case, **options), voice), voice)


@pytest.mark.parametrize("voice", VOICES)
def test_x_swapped_for_y_is_caught(voice: str) -> None:
    case = BY_NAME["adamw/warmup"]
    right = run(case, voice)
    assert right.x is not None
    swapped = dataclasses.replace(right, y=right.x, x=right.y)
    assert caught(case, swapped, voice)


def test_an_error_at_one_place_is_found_there() -> None:
    leaves = {"a": np.zeros((5, 2)), "b": np.zeros(5)}
    right = Trajectory(leaves, leaves, leaves)
    wrong = {"a": np.zeros((5, 2)), "b": np.array([0, 0, 0, 2.0**-20, 0])}
    distance = compare(Trajectory(leaves, wrong, leaves), right, "float32")
    assert (distance.sequence, distance.leaf, distance.step) == ("x", "b", 3)
    assert distance.ulps == 8
    assert curve(Trajectory(leaves, wrong, leaves), right, "float32", "x")[3] == 8


def test_ulps_grow_with_the_largest_weight_of_the_leaf_at_that_step() -> None:
    right = {"a": np.array([[1.0, 4.0], [0.1, 0.2]])}
    wrong = {"a": right["a"] + 2.0**-23}
    distance = compare(
        Trajectory(wrong, None, right), Trajectory(right, right, right), "float32"
    )
    assert distance.ulps == pytest.approx(1)  # 1/4 at the first step
    assert distance.step == 1


def test_nan_is_infinitely_far() -> None:
    right = {"a": np.ones(3)}
    wrong = {"a": np.array([1, np.nan, 1])}
    distance = compare(
        Trajectory(wrong, None, right), Trajectory(right, right, right), "float32"
    )
    assert np.isinf(distance.ulps)
    assert distance.step == 1


@pytest.mark.parametrize(
    "leaves", [{"b": np.ones(3)}, {"a": np.ones((3, 1))}], ids=["names", "shapes"]
)
def test_different_leaves_are_an_error(leaves: dict[str, np.ndarray]) -> None:
    right = {"a": np.ones(3)}
    with pytest.raises(ValueError, match=r"leaves|shapes"):
        compare(
            Trajectory(leaves, None, leaves), Trajectory(right, None, right), "float32"
        )


def test_only_the_rounding_of_a_bfloat16_parameter_is_forgiven() -> None:
    y = {"a": np.full((2, 1), 1.0)}
    right = {"a": np.full((2, 1), 1 + 2.0**-8)}  # half way to the next bfloat16
    narrow = Trajectory(y, None, right).with_rounding()
    assert compare(narrow, Trajectory(right, None, right), "bfloat16").ulps == 0
    further = {"a": np.full((2, 1), 1 + 2.0**-8 + 2.0**-20)}
    assert compare(narrow, Trajectory(further, None, right), "bfloat16").ulps > 7


def test_blocks_are_slices_of_large_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    adam = torch._fused_adam_

    def spy(tensors: Any, *args: Any, **options: Any) -> None:
        sizes.extend(t.numel() for t in tensors)
        adam(tensors, *args, **options)

    monkeypatch.setattr(torch, "_fused_adam_", spy)
    case = BY_NAME["adamw/plain"]
    run(case, "torch", steps=2)
    assert sizes == [42, 1] * 2  # the empty one does not move
    sizes.clear()
    run(case, "torch blocks", steps=2)
    assert max(sizes) == 16  # of the 42


def test_a_rounded_change_takes_up_what_it_is_allowed_and_no_more() -> None:
    """As optax moves bfloat16 parameters: by a change that is rounded, and again."""
    rng = np.random.default_rng(0)

    def spread() -> np.ndarray:
        return rng.normal(size=200_000) * 10 ** rng.uniform(-4, 1, 200_000)

    def narrow(values: np.ndarray) -> np.ndarray:
        return rounded(values, "bfloat16")

    p, y = narrow(spread()), spread().astype(np.float32)
    moved = {"a": narrow(p + narrow(narrow(y) - p))[None]}
    error = np.abs(moved["a"] - y.astype(float))
    trajectory = Trajectory({"a": wide(moved["a"])}, None, moved)
    without, allowed = (
        each.rounding["a"]  # type: ignore[index]
        for each in (
            trajectory.with_rounding(),
            trajectory.with_rounding(changes_from={"a": p}),
        )
    )
    assert np.all(error <= allowed)
    assert np.any(error > without + 0.9 * (allowed - without))
