"""Every voice, every case of the registry, every step, in y, x and z."""

from collections.abc import Callable

import pytest
import torch

from parity_tests.compare import tolerances
from parity_tests.compare.harness import check, comparisons
from parity_tests.registry import CASES
from parity_tests.registry.case import Case
from parity_tests.runners.voices import VOICES, unsupported

OURS = {"sf_jax", "sf_torch"}
ONE_BY_ONE = {"jax eager", "jax eager, x stored"}  # each operation is compiled alone


def cases_where(holds: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """The test once for each such case, all tests of a case in one process."""
    params = [
        pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name))
        for case in CASES
        if holds(case)
    ]
    return pytest.mark.parametrize("case", params)


def supports(*packages: str) -> Callable[[Case], bool]:
    return lambda case: not any(map(case.unsupported, packages))


def hold(case: Case, against: str, packages: set[str], eager: bool = False) -> None:
    outcomes = [
        check(case, voice, other)
        for voice, other in comparisons(case)
        if other == against and VOICES[voice].package in packages
        if (voice in ONE_BY_ONE) == eager
    ]
    assert outcomes
    assert [f"{o.voice}: {o.distance}" for o in outcomes if not o.ok] == []


@cases_where(lambda case: True)
def test_every_voice_follows_the_reference(case: Case) -> None:
    hold(case, "reference", OURS | {"meta"})


@pytest.mark.slow
@cases_where(lambda case: case.thorough)
def test_jax_without_jit_follows_the_reference(case: Case) -> None:
    hold(case, "reference", {"sf_jax"}, eager=True)


@cases_where(supports("meta"))
def test_ours_follow_metas(case: Case) -> None:
    hold(case, "meta", OURS)


@cases_where(lambda case: bool(case.recorded))
def test_what_others_recorded_is_reproduced(case: Case) -> None:
    hold(case, "golden", OURS | {"reference"})


@cases_where(supports("sf_jax", "sf_torch"))
def test_jax_and_torch_follow_each_other(case: Case) -> None:
    hold(case, "torch", {"sf_jax"})


@cases_where(lambda c: supports("optax")(c) and "warmup" not in c.features)
def test_optax_contrib_agrees_without_warmup(case: Case) -> None:
    hold(case, "reference", {"optax"})


@cases_where(lambda c: supports("optax")(c) and "warmup" in c.features)
def test_optax_contrib_parts_with_warmup(case: Case) -> None:
    outcome = check(case, "optax", "reference")
    assert outcome.limit is tolerances.OPTAX_WARMUP
    assert outcome.ok, outcome.distance


@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_runs_some_case_and_every_refusal_says_why(voice: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = [unsupported(case, voice, device) for case in CASES]
    assert None in reasons
    assert all(reason is None or len(reason) > 5 for reason in reasons)


def test_every_kind_of_leaf_dtype_and_source_is_in_the_registry() -> None:
    shapes = {shape for case in CASES for shape in case.tree.values()}
    assert () in shapes
    assert any(0 in shape for shape in shapes)
    assert {case.dtype for case in CASES} == {"float32", "float64", "bfloat16"}
    assert {"missing gradients", "groups", "complex"} <= {
        feature for case in CASES for feature in case.features
    }
    assert len({case.name for case in CASES}) == len(CASES)
