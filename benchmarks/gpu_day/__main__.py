"""Runs everything that a GPU is needed for, and leaves it in one folder.

    python -m benchmarks gpu-day --out out/gpu-day
    python -m benchmarks gpu-day --device cpu        # a rehearsal, in small sizes

For a machine with a GPU, PyTorch and JAX; no network. Each part is a process of at
most 9 minutes that writes its record to OUT/DEVICE/PART.json. A part that fails or is
too slow stops nothing. Run again, the command goes on with what is not done. The exit
status is 1 where a part has failed; OUT/DEVICE/README.md shows all that was found.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_day import summary
from benchmarks.gpu_day.plan import ROOT, parts
from benchmarks.gpu_day.run import FAILED, result_of

LIMIT = 540.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    on_gpu = options.device == "gpu"
    about = _about(options.device)
    if on_gpu and not about["devices"]:
        print("No GPU: neither PyTorch nor JAX finds one. Rehearse with --device cpu.")
        return 2
    name = re.sub(r"\W+", "-", about["machine"].lower()).strip("-")
    out = (options.out / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{about['machine']}: {out}")
    results: list[dict[str, Any]] = []
    for part in parts(on_gpu, out):
        if options.only and part.name not in options.only:
            continue
        result = result_of(part, out, on_gpu, options.limit)
        before = "" if result["again"] else ", before"
        reason = f": {result['reason']}" if result["reason"] else ""
        print(f"{part.name}: {result['status']}{before}{reason}", flush=True)
        results.append(result)
        # After each, so that a day that is cut off leaves what it has.
        summary.write(out, about, results)
    failed = [result["part"] for result in results if result["status"] == FAILED]
    print(f"Written: {out / 'README.md'}. Failed: {', '.join(failed) or 'nothing'}.")
    return 1 if failed else 0


def _about(device: str) -> dict[str, Any]:
    """Asked for in another process: this one must not hold memory of the device."""
    command = (sys.executable, "-m", "benchmarks.gpu_day.about", device)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--out", type=Path, default=Path("out/gpu-day"))
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds that a part may take (540)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
