"""The command line: the table, the report, skips that show, and the exit status."""

import dataclasses
import io
import json
import pathlib
import re

import pytest
from rich.console import Console

from parity_tests.cli import matrix
from parity_tests.cli.main import main
from parity_tests.cli.table import table
from parity_tests.compare.distance import Distance
from parity_tests.compare.harness import Outcome
from parity_tests.compare.tolerances import Limit
from parity_tests.registry import CASES

FEW = ["matrix", "--case", "sgd/[dw][ea]*", "--steps", "12"]  # decay_*, warmup


def test_the_report_is_one_page_that_needs_nothing_else(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FEW, "--report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sgd/warmup" in printed
    assert "comparisons of 3 cases hold" in printed
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["distances.md", "index.html", "summary.json"]

    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 2
    links = re.findall(r"""(?:src|href)=["']?(?!#)[^"'\s>]+""", page)
    assert links == []
    assert "<script" not in page
    to_rows = re.findall(r'<a href="#([^"]+)"', page)
    assert len(to_rows) > 10
    assert all(page.count(f'id="{row}"') == 1 for row in to_rows)

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"] is True
    compared = {(row["case"], row["against"]) for row in summary["comparisons"]}
    assert ("sgd/warmup", "meta") in compared
    known = [row for row in summary["comparisons"] if row["must_differ"]]
    assert {row["case"] for row in known} == {"sgd/warmup"}
    assert any(row["what"] == "sgd/decay_z in meta" for row in summary["skipped"])

    # README's table: of each optimizer the worst of its float32 cases.
    _, _, row = (tmp_path / "distances.md").read_text().splitlines()
    name, count, *cells = row.strip("| ").split(" | ")
    furthest = max(
        row["ulps"]
        for row in summary["comparisons"]
        if row["against"] == "reference" and row["voice"].startswith("torch")
    )
    assert (name, count, cells[1]) == ("sgd", "3", f"{furthest:.1f}")


def test_the_table_keeps_the_step_where_the_terminal_is_narrow() -> None:
    distance = Distance(123.45, "z", "matrix", 299)
    limit = Limit(200.0, "")
    outcome = Outcome("adamw_algoperf/together", "torch", "reference", distance, limit)
    for every_pair in (False, True):
        text = io.StringIO()
        Console(width=100, file=text).print(table([outcome], every_pair))
        assert "…" not in text.getvalue()


def test_a_mismatch_is_named_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(c for c in CASES if c.name == "sgd/decay_y")
    reference_alone_decays = dataclasses.replace(
        case,
        optimizer=dataclasses.replace(
            case.optimizer,
            arguments=lambda o: {**case.optimizer.arguments(o), "weight_decay": 0.0},
        ),
    )
    monkeypatch.setattr(matrix, "CASES", (reference_alone_decays,))
    assert main([*FEW, "--all"]) == 1
    printed = capsys.readouterr().out
    assert "MISMATCH sgd/decay_y: torch from reference" in printed
    assert "MISMATCH sgd/decay_y: jax scan from reference" not in printed


def test_an_absent_device_is_skipped_in_sight(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(matrix, "_present", lambda framework, device: False)
    assert main([*FEW, "--device", "gpu", "--report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "SKIPPED jax: finds no gpu on this machine" in printed
    assert "SKIPPED torch: finds no cuda on this machine" in printed
    assert "0 of 0 comparisons of 3 cases hold, on gpu" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"what": "jax", "reason": "finds no gpu on this machine"} in summary[
        "skipped"
    ]


def test_an_unknown_case_lists_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["matrix", "--case", "adam"]) == 2
    assert "adamw/plain" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["0", "301"])
def test_steps_out_of_range_are_refused(
    steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["matrix", "--steps", steps])
    assert f"got {steps}" in capsys.readouterr().err
