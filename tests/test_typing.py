"""What a strict type checker says of a program that uses both packages: nothing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "user_program.py"


# The first run reads the types of torch, jax and flax, which takes a minute.
@pytest.mark.slow
def test_mypy_finds_nothing_in_a_strict_users_program(tmp_path):
    settings = tmp_path / "mypy.ini"  # a user's, not this project's
    settings.write_text(
        "[mypy]\nstrict = True\n[mypy-optax.*]\nignore_missing_imports = True\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", PROGRAM),
            *("--config-file", settings),
            # Of this package as of installed ones the types count, not what is in it.
            "--follow-imports=silent",
            *("--cache-dir", ROOT / ".mypy_cache" / "user_program"),
        ],
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_program_runs():
    runpy.run_path(str(PROGRAM))["main"]()
