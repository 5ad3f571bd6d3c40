"""The code in the README, and in docs/, runs as it stands."""

import inspect
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import optax
import pytest
import torch

import sf_jax
import sf_torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.M | re.S)


def blocks(language):
    for page in PAGES:
        if language == "python" and page.parent.name == "tutorials":
            continue  # whose blocks follow one another; see below
        text = page.read_text()
        for match in BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                yield pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}")


def surroundings():
    """What a snippet may take for granted: names that the reader's program has."""
    params = {"w": jnp.ones(3)}
    tx = sf_jax.schedule_free_adamw()
    model = torch.nn.Linear(3, 2)
    return {
        "jnp": jnp,
        "optax": optax,
        "sf_jax": sf_jax,
        "torch": torch,
        "params": params,
        "grads": params,
        "tx": tx,
        "state": SimpleNamespace(params=params, opt_state=tx.init(params)),
        "evaluate": lambda params: 0.0,
        "model": model,
        "total_steps": 1000,
    }


# PyTorch's own, when ZeroRedundancyOptimizer is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<block>", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_the_notebook_that_the_site_offers(
    page, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    notebook = runpy.run_path(ROOT / "docs" / "notebooks.py")["notebook"]
    notebook = json.loads(json.dumps(notebook(page.read_text())))
    namespace = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], cell["id"], "exec"), namespace)
        else:
            assert "```" not in cell["source"]
            assert "](../" not in cell["source"]  # leads nowhere from a download


@pytest.mark.parametrize("diff", list(blocks("diff")))
def test_both_sides_of_a_diff_run(diff):
    for drop in "+-":
        lines = [line[1:] for line in diff.splitlines() if not line.startswith(drop)]
        exec(compile("\n".join(lines), f"<without {drop}>", "exec"), surroundings())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


BULLET = re.compile(r"^- (JAX|PyTorch): (.*?)(?=^- |^$)", re.M | re.S)
OPTIMIZER = re.compile(
    r"`(\w*(?:schedule_free|_average|gpa_|growing_)\w*|\w*(?:ScheduleFree|GPA)\w*)`"
)


def test_docs_name_what_there_is():
    """Of each member the files and the optimizers, in both packages."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    packages = {"JAX": sf_jax, "PyTorch": sf_torch}
    seen = set()
    for framework, bullet in BULLET.findall(text):
        package = packages[framework]
        for name in re.findall(r"`(_[\w/]+\.py)`", bullet):
            assert (ROOT / package.__name__ / name).exists(), name
        for name in OPTIMIZER.findall(bullet):
            assert hasattr(package, name), name
            seen.add(name)
    assert {"schedule_free_plus", "AdamCScheduleFreePlus", "GPAAdamW"} <= seen


def test_the_table_of_step_times_is_the_one_measured():
    results = ROOT / "benchmarks" / "results" / "cpu" / "results.md"
    table = re.search(r"^\| ms a step.*?\n\n", results.read_text(), re.M | re.S)
    assert table[0] in (ROOT / "README.md").read_text()


def test_the_reference_has_every_public_name():
    for page, package in (("jax", sf_jax), ("torch", sf_torch)):
        text = (ROOT / "docs" / "reference" / f"{page}.md").read_text()
        named = set(re.findall(rf"^::: {package.__name__}\.(\w+)$", text, re.M))
        assert named == set(package.__all__)


def test_the_migration_guide_names_every_argument_that_optax_lacks():
    text = (ROOT / "docs" / "migrating.md").read_text()
    for optimizer in (
        sf_jax.schedule_free,
        sf_jax.schedule_free_sgd,
        sf_jax.schedule_free_adamw,
    ):
        for name, parameter in inspect.signature(optimizer).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert f"`{name}`" in text, name


def test_the_readme_is_short_and_its_quick_starts_are():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 250
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        assert code.count("\n") <= 20 + code.count("\n\n")
