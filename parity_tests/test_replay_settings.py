"""A recorded run is checked against settings that are not its own."""

import pytest
import torch

import sf_torch
from parity_tests.cli.main import main
from parity_tests.cli.replay import replay


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    w = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = sf_torch.AdamWScheduleFree(
        [w], lr=0.05, warmup_steps=5, weight_decay=0.1
    )
    optimizer.train()
    with sf_torch.record(optimizer, path):
        for _ in range(20):
            w.grad = w.detach() - 3
            optimizer.step()
    return path


def test_settings_that_are_the_same_change_nothing(file):
    verdict = replay(file, {"warmup_steps": 5, "weight_decay": 0.1})
    assert verdict.ok
    assert not verdict.differing


def test_the_setting_that_makes_the_difference_is_named(file):
    # eps is far below the roots of the second moments here, and makes no difference.
    verdict = replay(file, {"weight_decay": 0.01, "eps": 2e-8})
    assert not verdict.ok
    assert verdict.differing == {"weight_decay": 0.1, "eps": 1e-8}
    assert verdict.reason == "weight_decay is 0.1, as recorded"


def test_settings_that_make_it_together_are_named_together(file):
    verdict = replay(file, {"weight_decay": 0.01, "warmup_steps": 7})
    assert verdict.reason == "weight_decay, warmup_steps are as recorded"


def test_the_command_takes_them_and_refuses_what_is_none(file, capsys):
    assert main(["replay", str(file), "--set", "decay_at=z", "--set", "b1=0.9"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not as recorded: decay_at, which was y." in printed
    assert "Likely reason: " in printed
    assert "Not as recorded: b1" not in printed
    assert main(["replay", str(file), "--set", "warmup=5"]) == 2
    assert "there is no setting warmup" in capsys.readouterr().out


def test_a_weight_decay_that_changed_during_the_run_is_named(tmp_path):
    w = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = sf_torch.AdamWScheduleFree([w], lr=0.05, weight_decay=0.1)
    optimizer.train()
    with sf_torch.record(optimizer, tmp_path / "run"):
        for k in range(12):
            optimizer.param_groups[0]["weight_decay"] = 0.1 if k < 7 else 0.5
            w.grad = w.detach() - 3
            optimizer.step()
    reason = replay(tmp_path / "run").reason
    assert reason is not None
    assert "weight_decay became 0.5 at step 8, and was 0.1" in reason
