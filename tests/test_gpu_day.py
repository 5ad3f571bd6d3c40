"""The GPU day's machinery, with parts that are done, fail, hang or lack something."""

import fnmatch
import json
import sys

import pytest

from benchmarks.gpu_day import plan, summary
from benchmarks.gpu_day.run import DONE, FAILED, SKIPPED, result_of
from parity_tests.registry import CASES

ABOUT = {"machine": "a machine", "commit": "abc", "python": "3", "versions": {}}


def part(code="", needs=()):
    return plan.Part("it", "what it shows", (sys.executable, "-c", code), needs)


def result(tmp_path, *arguments, limit=60.0):
    return result_of(part(*arguments), tmp_path, on_gpu=False, limit=limit)


@pytest.mark.parametrize(
    ("arguments", "limit", "status", "reason"),
    [
        (("print('fine')",), 60, DONE, ""),
        (("raise SystemExit('no such device')",), 60, FAILED, "no such device"),
        (("import os; os.abort()",), 60, FAILED, "exit status -6"),
        (("import time; time.sleep(60)",), 0.5, FAILED, "not done after"),
        (("", ("no_such_package",)), 60, SKIPPED, "no_such_package not installed"),
    ],
    ids=["done", "fails", "crashes", "hangs", "lacks"],
)
def test_every_end_of_a_part_is_a_record(arguments, limit, status, reason, tmp_path):
    found = result(tmp_path, *arguments, limit=limit)
    assert found["status"] == status
    assert reason in found["reason"]
    assert json.loads((tmp_path / "it.json").read_text())["status"] == status


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path):
    assert result(tmp_path, "raise SystemExit(1)")["status"] == FAILED
    assert result(tmp_path, "print('fine')")["again"]
    again = result(tmp_path, "raise SystemExit(1)")
    assert again["status"] == DONE
    assert not again["again"]


def test_a_record_that_was_cut_off_counts_for_nothing(tmp_path):
    (tmp_path / "it.json").write_text('{"status": "do')
    assert result(tmp_path)["again"]


def test_tests_that_were_all_skipped_are_no_success(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("import pytest\npytest.skip('no', allow_module_level=True)\n")
    command = (sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path))
    skips = plan.Part("it", "", (*command, str(file)))
    assert result_of(skips, tmp_path, False, 60.0)["status"] == SKIPPED


def test_the_page_shows_reasons_tables_and_pictures(tmp_path):
    done = result(tmp_path)
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "table.md").write_text("| a table |")
    (tmp_path / "it" / "steps.png").write_bytes(b"")
    failed = {**done, "part": "other", "status": FAILED, "reason": "a | b"}
    summary.write(tmp_path, ABOUT, [done, failed])
    page = (tmp_path / "README.md").read_text()
    assert "| a table |" in page
    assert "![steps](it/steps.png)" in page
    assert "failed: a / b |" in page
    assert len(json.loads((tmp_path / "summary.json").read_text())["parts"]) == 2


@pytest.mark.parametrize("on_gpu", [True, False])
def test_parts_have_names_of_their_own_and_files_that_are_there(on_gpu, tmp_path):
    parts = plan.parts(on_gpu, tmp_path)
    assert len({each.name for each in parts}) == len(parts)
    files = [word for each in parts for word in each.command if word.endswith(".py")]
    assert all((plan.ROOT / file).is_file() for file in files)


def test_the_parity_parts_run_every_case_once():
    for case in CASES:
        matches = [p for p in plan.PARITY.values() if fnmatch.fnmatch(case.name, p)]
        assert len(matches) == 1, case.name


def test_the_rehearsal_has_a_case_for_each_parity_part(tmp_path):
    for each in plan.parts(False, tmp_path):
        if "--case" in each.command:
            pattern = each.command[each.command.index("--case") + 1]
            assert any(fnmatch.fnmatch(case.name, pattern) for case in CASES)
