"""The benchmark program at tiny sizes: it measures, draws and writes what it says."""

import contextlib
import io
import json
import os
import runpy
import sys

import pytest

pytest.importorskip("rich")

from benchmarks import __main__ as program
from benchmarks import report
from benchmarks.candidates import CANDIDATES, Candidate
from benchmarks.measure import Settings, measure
from benchmarks.trees import gpt2, many, one

# One process for all of them, since each would take the smoke run for itself.
pytestmark = pytest.mark.xdist_group("benchmarks")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    # As `python -m benchmarks` does, but here: another process would spend most of its
    # time on importing the frameworks.
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["benchmarks", "--smoke", "--out", str(out)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(program.__file__, run_name="__main__")
    assert done.value.code == 0
    return out, printed.getvalue()


def test_every_candidate_is_measured_or_says_why_not(results):
    out, printed = results
    content = json.loads((out / "results.json").read_text())
    steps = [row for row in content["rows"] if row["experiment"] == report.STEPS]
    assert [row["candidate"] for row in steps] == [c.name for c in CANDIDATES]
    for row in steps:
        if not row["note"]:
            assert 0 < row["minimum_ms"] <= row["median_ms"]
            assert row["times_floor"] > 0
            # z and v, or m and v, in float32; SGD has z alone, GPA and ScheduleFree+
            # have m too.
            expected = 4.0 if "SGD" in row["candidate"] else 8.0
            if row["candidate"].endswith(("GPAAdamW", "ScheduleFree+")):
                expected = 12.0
            assert row["state_bytes_per_parameter"] == pytest.approx(expected, abs=0.1)
        assert row["candidate"] in printed
    # What would compile for long is left out of so short a run.
    assert {c.name for c in CANDIDATES if c.ours and not c.first_seconds} <= {
        row["candidate"] for row in steps if not row["note"]
    }
    assert content["versions"]["jax"]
    assert content["machine"].endswith("CPU")


def test_x_is_timed_where_it_can_be_found(results):
    rows = json.loads((results[0] / "results.json").read_text())["rows"]
    timed = {
        row["candidate"]: set(row["evaluation_ms"]) for row in rows[: len(CANDIDATES)]
    }
    assert timed["sf_torch"] == {"eval_params()", "eval() and train()"}
    assert timed["sf_jax in optax.flatten"] == {"eval_params, jitted"}
    assert not timed["optax adamw"]


def test_pictures_and_a_table_to_paste_are_written(results):
    out, _ = results
    assert "| **sf_torch** |" in (out / "results.md").read_text()
    for name in (report.STEPS, report.LEAVES):
        assert (out / f"{name}.png").stat().st_size > 10_000


def test_an_absent_device_is_said_to_be_absent(capsys):
    if "tpu" in os.environ.get("JAX_PLATFORMS", ""):
        pytest.skip("there is a TPU here")
    assert program.main(["--device", "tpu"]) == 0
    assert "Skipped: neither PyTorch nor JAX finds a tpu" in capsys.readouterr().out


def test_what_cannot_run_is_shown_and_stops_nothing():
    def breaks(params):
        raise TypeError("no such option")

    absent = Candidate("absent", "torch", "no_such_package", breaks)
    broken = Candidate("broken", "torch", "torch", breaks)
    slow = Candidate("slow", "torch", "torch", breaks, first_seconds=99.0)
    settings = Settings({"torch": "cpu"}, seconds=0.0, rounds=1)
    fine = CANDIDATES[0]
    rows = measure("steps", one(64), [absent, broken, slow, fine], settings)
    assert [row.note for row in rows] == [
        "not installed",
        "failed: TypeError: no such option",
        "not run: would compile for about 99 s",
        "",
    ]
    assert rows[-1].median_ms > 0
    (row,) = measure("steps", one(64), [CANDIDATES[-1]], settings)
    assert row.note == "jax has no such device"


def test_the_forecast_of_compilation_grows_with_the_tree():
    settings = Settings({"jax": "cpu"}, compile_limit=30.0)
    candidate = CANDIDATES[-1]
    settings.saw(candidate, gpt2(), 5.0)
    assert not settings.why_not(candidate, many(800, 8))
    assert "about 68 s" in settings.why_not(candidate, many(2000, 8))


def test_trees_are_what_they_are_called():
    assert len(gpt2().shapes) == 148
    assert gpt2().size == 124_439_808  # GPT-2 small
    assert str(gpt2(192)).startswith("GPT-2 small at 1/4 of its width: 148 tensors")
    assert str(many(2000, 2**13)) == "2,000 tensors of 8K, 16.38M parameters"
    assert str(one(2**27)) == "1 tensor, 134.2M parameters"
