"""Every voice, every case of the registry, every step, in y, x and z."""

import pytest

from parity_tests import tolerances
from parity_tests.cases import CASES, Case
from parity_tests.harness import VOICES, check, comparisons, unsupported

# With jit, a program is compiled for every case: what varies between programs is
# tried on the cases in which programs vary.
EVERYWHERE = (
    "jax scan",
    "torch",
    "torch foreach",
    "torch Reference",
    "torch Closure",
    "meta",
    "golden",
)
IN_JAX = ("jax scan, x stored", "jax jit", "jax jit, x stored")
EAGER = ("jax eager", "jax eager, x stored")
BY_NAME = {case.name: case for case in CASES}


def of_case(*names: str) -> pytest.MarkDecorator:
    """The test once for every case; cases stay in one process, which keeps runs."""
    cases = [BY_NAME[name] for name in names] or CASES
    params = [
        pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name))
        for case in cases
    ]
    return pytest.mark.parametrize("case", params)


def lacking(case: Case) -> set[str]:
    packages = {row.package for row in VOICES.values()} - {"reference", "golden"}
    return {package for package in packages if case.unsupported(package)}


def hold(case: Case, voices: tuple[str, ...], against: str | None = None) -> None:
    outcomes = [
        check(case, voice, other)
        for voice, other in comparisons(case, voices)
        if against in (other, None)
    ]
    assert [
        f"{o.voice} - {o.against}: {o.distance}" for o in outcomes if not o.ok
    ] == []


@of_case()
def test_every_voice_follows_the_reference(case: Case) -> None:
    hold(case, EVERYWHERE, "reference")


@of_case(*(c.name for c in CASES if "meta" not in lacking(c)))
def test_ours_follow_metas(case: Case) -> None:
    hold(case, EVERYWHERE, "meta")


@of_case(*(c.name for c in CASES if c.recorded))
def test_what_others_recorded_is_reproduced(case: Case) -> None:
    hold(case, EVERYWHERE, "golden")


@of_case(*(c.name for c in CASES if not {"sf_jax", "sf_torch"} & lacking(c)))
def test_jax_and_torch_follow_each_other(case: Case) -> None:
    hold(case, ("jax scan", "torch"), "torch")


@of_case("sgd/together", "adamw/together", "radam/plain", "adamw/b1_schedule")
def test_jax_is_the_same_program_by_program(case: Case) -> None:
    hold(case, IN_JAX)


@of_case("sgd/warmup", "adamw/bfloat16")
def test_jax_is_the_same_without_jit(case: Case) -> None:
    hold(case, EAGER)


@of_case("sgd/plain", "adamw/plain", "adamw/decay_y", "adamw/network")
def test_optax_contrib_agrees_without_warmup(case: Case) -> None:
    hold(case, ("optax",))


@of_case("sgd/warmup", "adamw/warmup")
def test_optax_contrib_parts_with_warmup(case: Case) -> None:
    outcome = check(case, "optax", "reference")
    assert outcome.limit is tolerances.OPTAX_WARMUP
    assert outcome.ok, outcome.distance


def test_every_voice_runs_some_case_and_every_refusal_says_why() -> None:
    for voice in VOICES:
        reasons = [unsupported(case, voice) for case in CASES]
        assert None in reasons, voice
        assert all(reason is None or len(reason) > 5 for reason in reasons)
