"""The fused kernels as compiled for an H100, anywhere: one pass, wide accesses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Bytes an element: every array read once and written once.
ADAMW = 4 * (4 + 3)  # y, z, v, g; y, z, v
MOVED = {
    "sgd": 4 * (3 + 2),
    "adamw": ADAMW,
    "adamw_momentum": ADAMW + 4 * 2,
    # The parameter is written only: y is between x and z. It and g take 2 bytes.
    "adamw_bfloat16": 2 * (1 + 1) + 4 * (3 + 3),
    "adamw_unaligned": ADAMW,
    "to_x": 4 * (2 + 2),
    "to_y": 4 * (3 + 1),
}


@pytest.fixture(scope="module")
def facts():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = pathlib.Path(__file__).with_name("ptx.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", MOVED)
def test_each_array_is_read_once_and_written_once(facts, kernel):
    assert facts[kernel]["bytes"] == MOVED[kernel]
    assert facts[kernel]["stack"] == 0  # no register is spilled


@pytest.mark.parametrize("kernel", [name for name in MOVED if "unaligned" not in name])
def test_threads_move_four_elements_at_once(facts, kernel):
    narrowest = 4 * 2 if "bfloat16" in kernel else 4 * 4
    assert facts[kernel]["narrowest"] >= narrowest
