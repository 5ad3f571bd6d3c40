"""Runs one part and says how it went; never raises for what the part does."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.plan import ROOT, Part

DONE, FAILED, SKIPPED = "done", "failed", "skipped"
NOTHING_COLLECTED = 5  # pytest's exit status
LAST = 30  # lines of output that the record keeps


def result_of(part: Part, out: Path, on_gpu: bool, limit: float) -> dict[str, Any]:
    """What came of a part: its record as it is there already, or that of running it.

    A part that is done is not run again, one that failed or was skipped is.
    """
    record = out / f"{part.name}.json"
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(record.read_text())
        if before["status"] == DONE:
            return {**before, "again": False}
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        result = {"status": SKIPPED, "reason": f"{', '.join(missing)} not installed"}
    else:
        result = _run(part, out, on_gpu, limit)
    result = {"part": part.name, "what": part.what, **result}
    # In one move: a part that is cut off here has no record.
    unfinished = record.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(record)
    return {**result, "again": True}


def _run(part: Part, out: Path, on_gpu: bool, limit: float) -> dict[str, Any]:
    log, start = out / f"{part.name}.log", time.perf_counter()
    environment = {**os.environ, **_environment(on_gpu), **dict(part.environment)}
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children end with it
        )
        with _ended(process):
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
    output = log.read_text(errors="replace").splitlines()
    result = {
        "status": DONE,
        "reason": "",
        "seconds": round(time.perf_counter() - start, 1),
        "command": list(part.command),
        "last_lines": output[-LAST:],
    }
    if status is None:
        result |= {"status": FAILED, "reason": f"not done after {limit:.0f} s"}
    elif _ran_no_test(part, status, output):
        result |= {"status": SKIPPED, "reason": "no test applies here"}
    elif status != 0:
        last = next((line for line in reversed(output) if line.strip()), "no output")
        result |= {"status": FAILED, "reason": f"exit status {status}: {last[:200]}"}
    return result


def _ran_no_test(part: Part, status: int, output: list[str]) -> bool:
    if "pytest" not in part.command:
        return False
    skipped_all = status == 0 and not any(" passed" in line for line in output[-2:])
    return status == NOTHING_COLLECTED or skipped_all


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """However it is left, the process and its children are gone afterwards."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(on_gpu: bool) -> dict[str, str]:
    common = {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    if on_gpu:
        # PyTorch needs memory there too.
        return {**common, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**common, "JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
