"""The fused kernels as compiled for NVIDIA's GPUs, anywhere: one pass, wide accesses.

Every kernel that a member of the family launches, for each form of its state.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

REGISTERS = 128  # a thread: 512 are then there at once, with 64 KB under way an SM


@pytest.fixture(
    scope="module",
    params=[
        ("sm_90", "float32", "bfloat16"),
        pytest.param(("sm_90", "float16"), marks=pytest.mark.slow),
        pytest.param(
            ("sm_80", "sm_100", "float32", "bfloat16", "float16"),
            marks=pytest.mark.slow,
        ),
    ],
    ids="-".join,
)
def kernels(request):
    script = pathlib.Path(__file__).with_name("ptx.py")
    done = subprocess.run(
        [sys.executable, str(script), *request.param],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 10
    return found


def test_each_array_is_read_once_and_written_once(kernels):
    """Bytes an element, of the accesses in the program and of the arrays there are."""
    wrong = [kernel for kernel in kernels if kernel["bytes"] != kernel["least"]]
    assert not wrong


def test_no_register_is_spilled(kernels):
    wrong = [kernel for kernel in kernels if kernel["stack"]]
    wrong += [kernel for kernel in kernels if kernel["registers"] > REGISTERS]
    assert not wrong


def test_threads_move_16_bytes_at_once(kernels):
    aligned = [kernel for kernel in kernels if kernel["aligned"]]
    wrong = [kernel for kernel in aligned if kernel["narrowest"] < 16]
    assert aligned
    assert not wrong
