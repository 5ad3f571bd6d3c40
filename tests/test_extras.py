"""What works when optional packages are absent, and what is said of them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import sf_torch

ROOT = Path(__file__).parents[1]


def without(absent: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process in which no package of these can be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + code],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("absent", "code", "said"),
    [
        (["jax"], "import sf_jax", "sf_jax needs jax and optax, and jax is not"),
        (["torch"], "import sf_torch", "extra [torch]"),
    ],
)
def test_an_absent_framework_is_named_with_its_extra(absent, code, said):
    done = without(absent, code)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("sf_jax", ["torch", "flax", "orbax", "safetensors", "schedulefree"]),
        ("sf_torch", ["jax", "optax", "flax", "scipy", "safetensors", "schedulefree"]),
    ],
)
def test_each_package_needs_its_own_framework_alone(package, absent):
    done = without(absent, f"import {package}")
    assert done.returncode == 0, done.stderr


def test_the_commands_run_with_what_record_brings_and_name_what_is_absent(tmp_path):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = sf_torch.AdamWScheduleFree([w], lr=0.1, warmup_steps=2)
    optimizer.train()
    with sf_torch.record(optimizer, tmp_path / "run", every=1):
        for _ in range(4):
            w.grad = w.detach() - 3
            optimizer.step()
    code = f"""
from parity_tests.cli.main import main
print(main(["replay", {str(tmp_path / "run")!r}]))
print(main(["matrix", "--case", "[sp]*d*/plain", "--steps", "3"]))
print(main(["matrix", "--report", {str(tmp_path)!r}]))
"""
    done = without(["schedulefree", "prodigyopt", "jinja2", "matplotlib"], code)
    assert done.returncode == 0, done.stderr
    statuses = [line for line in done.stdout.splitlines() if line in "012"]
    assert statuses == ["0", "0", "2"]
    assert "needs schedulefree, which is not installed" in done.stdout
    assert "needs prodigyopt, which is not installed" in done.stdout
    assert "extra [parity]" in done.stderr


def test_a_command_without_its_extra_says_which():
    code = 'from parity_tests.cli.main import main; print(main(["replay", "run"]))'
    done = without(["jax"], code)
    assert done.stdout == "2\n"
    assert "needs jax, which is not installed" in done.stderr
    assert "extra [record]" in done.stderr


def test_every_requirement_has_a_lower_bound_that_make_oldest_can_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lowest = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lowest.py"], capture_output=True, text=True
    ).stdout
    for name in ("jax", "flax", "record", "parity"):
        for requirement in extras[name]:
            package = requirement.partition(">")[0]
            if not package.startswith("schedulefree-jax["):
                assert f"{package}==" in lowest, requirement
