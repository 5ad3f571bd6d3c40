"""Times the step of every optimizer here against the floor and against peers.

    python -m benchmarks                      # CPU, some minutes
    python -m benchmarks --device cuda        # also gpu, the same; or tpu
    python -m benchmarks --only steps         # without the growth curves
    python -m benchmarks gpu-day              # all that a GPU is needed for

Prints tables, and writes results.json, results.md and pictures to
benchmarks/results/DEVICE/. docs/benchmarks.md says how to read them.
"""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import facts
from benchmarks.trees import Tree, gpt2, many, one

RESULTS = Path(__file__).parent / "results"
GROWING = (
    "sf_torch",
    "Meta schedulefree foreach",
    "torch AdamW fused",
    "sf_jax",
    "optax.contrib schedule_free_adamw",
)
# On a CPU, of GPT-2 small in its own size.
WHOLE = (
    "sf_torch",
    "Meta schedulefree foreach",
    "torch AdamW fused",
    "sf_torch compiled",
)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == ["gpu-day"]:
        from benchmarks.gpu_day.__main__ import main as gpu_day

        return gpu_day(arguments[1:])
    options = _parser().parse_args(arguments)
    device = "gpu" if options.device == "cuda" else options.device
    # Before JAX starts: the CPU alone, or a GPU whose memory PyTorch needs too.
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices = facts.devices_for(device)
    if not devices:
        print(f"Skipped: neither PyTorch nor JAX finds a {device} here.")
        return 0

    from benchmarks import report
    from benchmarks.candidates import CANDIDATES
    from benchmarks.measure import Row, Settings, measure

    limit = options.compile_limit or (30.0 if device == "cpu" else 300.0)
    settings = Settings(devices, options.seconds, compile_limit=limit)
    if options.smoke:
        settings.seconds, settings.rounds, settings.compile_limit = 0.0, 2, 10.0
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    about = facts.facts(devices, command)
    out = options.out or RESULTS / device
    rows: list[Row] = []
    start = time.perf_counter()
    for experiment, tree, names in _plan(device, options.smoke):
        if experiment not in options.only:
            continue
        chosen = [c for c in CANDIDATES if not names or c.name in names]
        evaluations = experiment == report.STEPS
        new = measure(experiment, tree, chosen, settings, evaluations)
        report.show(new, about["machine"])
        rows += new
        # After each tree, so that a run that is cut off leaves what it has.
        report.write(out, rows, about, time.perf_counter() - start)
    print(f"{time.perf_counter() - start:.0f} s; written to {out}")
    return 0


def _plan(device: str, smoke: bool) -> Iterator[tuple[str, Tree, Sequence[str]]]:
    """What is measured: the experiment, the tree, and which candidates if not all."""
    from benchmarks import report

    on_cpu = device == "cpu"
    if smoke:
        yield report.STEPS, one(1000), ()
        yield report.LEAVES, many(2, 1024), GROWING
        return
    width = 192 if on_cpu else 768
    trees = (one(2**24 if on_cpu else 2**27), gpt2(width), many(2000, 2**13))
    for tree in trees:
        yield report.STEPS, tree, ()
        if not on_cpu or tree.name:
            yield report.STEPS, dataclasses.replace(tree, dtype="bfloat16"), ()
    if on_cpu:
        yield report.STEPS, gpt2(), WHOLE
    for count in (10, 100, 1000, 10_000):
        yield report.LEAVES, many(count, 2**10), GROWING
    for power in range(5, 8 if on_cpu else 10):
        yield report.PARAMETERS, one(10**power), GROWING


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "gpu", "tpu"), default="cpu"
    )
    parser.add_argument("--out", type=Path, help="in place of benchmarks/results/")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("steps", "leaves", "parameters"),
        default=("steps", "leaves", "parameters"),
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="of steps for each row, in 7 rounds of one step at least (1)",
    )
    parser.add_argument(
        "--compile-limit",
        type=float,
        metavar="SECONDS",
        help="leave out what would compile longer (30 on CPUs, else 300)",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
