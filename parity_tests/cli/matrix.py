"""Runs the cases of the registry in every voice and prints how far the voices differ.

The exit status is 1 where two voices are further apart than their limit. A device that
is absent and a case that a package cannot run are listed as skipped.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import pathlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import torch
from rich.console import Console
from rich.progress import track

from parity_tests.cli.table import WIDTH, table
from parity_tests.compare.harness import Outcome, Pair, check, comparisons
from parity_tests.registry import CASES
from parity_tests.registry.case import STEPS, Case
from parity_tests.runners.voices import VOICES, unsupported
from parity_tests.runners.voices import run as run_voice

# By the value of --device, the device of each framework. None: it is not run.
DEVICES: dict[str, dict[str, str | None]] = {
    "cpu": {"jax": "cpu", "torch": "cpu"},
    "gpu": {"jax": "gpu", "torch": "cuda"},
    "cuda": {"jax": None, "torch": "cuda"},
    "tpu": {"jax": "tpu", "torch": None},
}


@dataclasses.dataclass(frozen=True)
class Skip:
    """A package, kernel or device that was not run, and why."""

    what: str
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case", metavar="PATTERN", default="*", help="such cases only: 'adamw/*'"
    )
    parser.add_argument(
        "--steps", type=_steps, help="steps of each case; 300, and fewer for eager"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument(
        "--report", metavar="DIR", type=pathlib.Path, help="write index.html, JSON"
    )
    parser.add_argument(
        "--all", action="store_true", help="a line for every pair of voices"
    )


def _steps(text: str) -> int:
    number = int(text)
    if not 1 <= number <= STEPS:
        raise argparse.ArgumentTypeError(
            f"must lie in [1, {STEPS}], for which the limits hold; got {number}"
        )
    return number


def run(arguments: argparse.Namespace) -> int:
    if arguments.report:
        # Here, since only the report needs jinja2 and matplotlib, and before the run,
        # so that an absent one is known at once.
        from parity_tests.cli import report
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    cases = [c for c in CASES if fnmatch.fnmatch(c.name, arguments.case)]
    if not cases:
        console.print(f"No case is called {arguments.case}. There are:")
        console.print(", ".join(case.name for case in CASES))
        return 2
    places, absent = find_devices(arguments.device)
    started = time.monotonic()
    outcomes = list(outcomes_of(cases, places, arguments.steps, console))
    seconds = time.monotonic() - started
    skipped = [*absent, *skips(cases, places)]

    if outcomes:
        console.print(table(outcomes, arguments.all))
    for skip in absent:
        console.print(f"SKIPPED {skip.what}: {skip.reason}", style="bold yellow")
    console.print(_summary_of(skipped[len(absent) :]), style="dim", markup=False)
    failed = [o for o in outcomes if not o.ok]
    for o in failed:
        console.print(
            f"MISMATCH {o.case}: {o.voice} from {o.against} {o.distance} ulps, "
            f"limit {o.limit.ulps:.4g} ({o.limit.reason})",
            style="bold red",
            markup=False,
        )
    console.print(
        f"{len(outcomes) - len(failed)} of {len(outcomes)} comparisons of "
        f"{len(cases)} cases hold, on {arguments.device}, in {seconds:.0f} s."
    )
    if arguments.report:
        path = report.write(
            arguments.report,
            cases,
            outcomes,
            [(s.what, s.reason) for s in skipped],
            device=arguments.device,
            steps=arguments.steps,
            seconds=seconds,
        )
        console.print(f"Report: {path}")
    return 1 if failed else 0


def find_devices(name: str) -> tuple[dict[str, str], list[Skip]]:
    """The device of each framework that is to run, and the devices that are absent."""
    places, absent = {}, []
    for framework, device in DEVICES[name].items():
        if device is None:
            absent.append(Skip(framework, f"does not run on {name}"))
        elif not _present(framework, device):
            absent.append(Skip(framework, f"finds no {device} on this machine"))
        else:
            places[framework] = device
    return places, absent


def _present(framework: str, device: str) -> bool:
    if framework == "torch":
        return device == "cpu" or torch.cuda.is_available()
    try:
        return bool(jax.devices(device))
    except RuntimeError:  # JAX knows no such platform here
        return False


def outcomes_of(
    cases: list[Case], places: dict[str, str], steps: int | None, console: Console
) -> Iterable[Outcome]:
    """Runs and compares the cases, in the order in which results are ready."""
    voices = [
        name
        for name, row in VOICES.items()
        if row.framework == "numpy" or row.framework in places
    ]

    def place(voice: str) -> str:
        return places.get(VOICES[voice].framework, "cpu")

    pairs = {case: comparisons(case, voices, place) for case in cases}
    # JAX compiles in a second thread while PyTorch takes its steps in this one.
    with ThreadPoolExecutor(1) as pool:
        ahead = {
            case: [
                pool.submit(run_voice, case, voice, steps, place(voice))
                for voice in dict.fromkeys(itertools.chain(*pairs[case]))
                if VOICES[voice].framework == "jax"
            ]
            for case in cases
        }
        # A bar in a log would stand between the lines that are printed.
        shown = track(
            cases,
            "cases",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for case in shown:
            there = [pair for pair in pairs[case] if not _in_jax(pair)]
            for pair in there:
                yield check(case, *pair, steps, *map(place, pair))
            for future in ahead[case]:
                future.result()
            for pair in pairs[case]:
                if _in_jax(pair):
                    yield check(case, *pair, steps, *map(place, pair))


def _in_jax(pair: Pair) -> bool:
    return any(VOICES[voice].framework == "jax" for voice in pair)


def skips(cases: list[Case], places: dict[str, str]) -> list[Skip]:
    """The packages, and the fused kernel, that cannot run a case of these."""
    found = {}
    for case in cases:
        for voice, row in VOICES.items():
            reason = unsupported(case, voice, places.get(row.framework, "cpu"))
            if reason and row.package != "golden" and not row.options.get("form"):
                what = "fused" if row.options.get("fused") else row.package
                found[case.name, what] = Skip(f"{case.name} in {what}", reason)
    return list(found.values())


def _summary_of(skipped: list[Skip]) -> str:
    reasons: dict[str, int] = {}
    for skip in skipped:
        text = f"{skip.what.split()[-1]} {skip.reason}"
        reasons[text] = reasons.get(text, 0) + 1
    listed = "; ".join(f"{text} ({n})" for text, n in sorted(reasons.items()))
    return f"Skipped, with the number of cases: {listed or 'nothing'}."
