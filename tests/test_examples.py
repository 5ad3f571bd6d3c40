"""Every script in examples/ runs with --smoke and writes into --out."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.py") if "__main__" in p.read_text())

# Runs are shared between tests, so they all belong on one worker.
pytestmark = pytest.mark.xdist_group("examples")


@pytest.fixture(scope="session")  # tests of other files may come in between
def run(tmp_path_factory):
    """run(name) is what the script printed and the folder that it wrote into."""

    @functools.cache
    def run_once(name: str) -> tuple[str, Path]:
        out = tmp_path_factory.mktemp(name)
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py", "--smoke", "--out", out],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, out

    return run_once


@pytest.fixture
def digits(run):
    return run("digits")


LONG = {"anytime", "char_lm_linen", "char_lm_nnx", "digits", "port_a_run"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(p.stem, marks=[pytest.mark.slow] if p.stem in LONG else [])
        for p in SCRIPTS
    ],
)
def test_runs_and_writes_into_out(run, name):
    _, out = run(name)
    assert any(out.iterdir())


@pytest.mark.slow
def test_digits_prints_where_everything_is(digits):
    printed, out = digits
    written = {p.name for p in out.iterdir()}
    assert written == {
        "report.html",
        "curves.png",
        "summary.json",
        "torch.pt",
        "flax.msgpack",
    }
    for name in written:
        assert str(out / name) in printed


@pytest.mark.slow
def test_digits_optimizers_agree_on_equal_gradients(digits):
    summary = json.loads((digits[1] / "summary.json").read_text())
    assert summary["steps"] == 6
    for name in "xyz":
        assert summary[f"max_ulps_{name}"] <= 64
    assert {"jax_eval_accuracy", "torch_eval_accuracy", "seconds"} <= summary.keys()


@pytest.mark.slow
def test_digits_report_needs_no_other_file(digits):
    page = (digits[1] / "report.html").read_text()
    linked = re.findall(r"""(?:src|href)=["']?(?!["']?#)([^"'\s>]+)""", page)
    assert len(linked) == 3
    assert all(link.startswith("data:image/svg+xml;base64,") for link in linked)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


@pytest.mark.slow
def test_ported_run_agrees_on_equal_gradients(run):
    summary = json.loads((run("port_a_run")[1] / "summary.json").read_text())
    assert summary["ulps_when_ported"] <= 1
    assert summary["max_ulps_equal_gradients"] <= 64


@pytest.mark.slow
def test_digits_checkpoint_holds_tensors_only(digits):
    torch.load(digits[1] / "torch.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["char_lm_linen", "char_lm_nnx"])
def test_a_resumed_character_model_is_the_uninterrupted_one(run, name, tmp_path):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--smoke", "--out", tmp_path]
    for options in (["--steps", "2"], ["--steps", "4", "--resume"]):
        done = subprocess.run(
            command + options, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in done.stdout

    def at_the_end(out):
        with ocp.CheckpointManager((out / "checkpoints").resolve()) as manager:
            return manager.restore(4)

    _, out = run(name)
    jax.tree.map(np.testing.assert_array_equal, at_the_end(tmp_path), at_the_end(out))


@pytest.mark.slow
def test_anytime_reports_every_method_at_every_horizon(run):
    printed, out = run("anytime")
    assert {p.name for p in out.iterdir()} == {
        "anytime.png",
        "anytime.md",
        "anytime.json",
    }
    summary = json.loads((out / "anytime.json").read_text())
    horizons = [str(h) for h in summary["size"]["horizons"]]
    assert [row["runs"] for row in summary["table"]] == [*[1] * 6, len(horizons)]
    for row in summary["table"]:
        for horizon in horizons:
            assert 0 < row["mean"][horizon] < 10
            assert row["spread"][horizon] > 0
    assert (out / "anytime.md").read_text() in printed


def test_the_algoperf_submission_learns(run):
    _, out = run("algoperf_submission")
    losses = json.loads((out / "losses.json").read_text())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 * losses[0]
