"""Measures candidates side by side: one block of each in turn, round after round.

What a machine does beside the benchmark then falls on all of them alike. Each row has
the median and the least of its blocks, and its ratio to the floor: the time of an
in-place add over as many bytes as this candidate's own step has to move. That is the
gradient read, and parameters and state read and written, each once.
"""

import dataclasses
import gc
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.candidates import Candidate
from benchmarks.runners import Floor, Jax, Runner, Torch, peers_warnings_aside
from benchmarks.trees import Tree

RUNNERS: dict[str, type[Torch] | type[Jax]] = {"torch": Torch, "jax": Jax}


@dataclasses.dataclass
class Row:
    """One candidate on one tree. Either measured, or ``note`` says why not."""

    experiment: str
    tree: str
    tensors: int
    parameters: int
    dtype: str
    candidate: str
    framework: str
    note: str = ""
    median_ms: float | None = None
    minimum_ms: float | None = None
    rounds: int = 0
    floor_ms: float | None = None  # the median of the floor, for this row's traffic
    times_floor: float | None = None  # medians
    state_bytes_per_parameter: float | None = None
    extra_bytes_per_parameter: float | None = None
    # JAX: to compile. torch: the first step, which compiles and allocates.
    first_seconds: float | None = None
    evaluation_ms: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Settings:
    """How much time and memory measuring may take."""

    devices: dict[str, str]  # framework -> its device; a framework not in it has none
    seconds: float = 1.0  # of steps for each row
    rounds: int = 7  # at least
    compile_limit: float = 60.0  # seconds; rows that would need more are left out
    # candidate -> seconds a tensor that its first step took, for that forecast
    seconds_per_tensor: dict[str, float] = dataclasses.field(default_factory=dict)

    def why_not(self, candidate: Candidate, tree: Tree) -> str:
        if not candidate.installed:
            return "not installed"
        if candidate.framework not in self.devices:
            return f"{candidate.framework} has no such device"
        each = self.seconds_per_tensor.get(candidate.name, 0.0)
        seconds = max(candidate.first_seconds, each * max(len(tree.shapes), 10))
        if seconds > self.compile_limit:
            return f"not run: would compile for about {seconds:.0f} s"
        return ""

    def saw(self, candidate: Candidate, tree: Tree, seconds: float) -> None:
        compiles = candidate.framework == "jax" or candidate.first_seconds
        # Ours in torch compile blocks, of which many small tensors share one.
        if not compiles or (candidate.framework == "torch" and candidate.ours):
            return
        # Of a few tensors the fixed cost is the greater part.
        each = seconds / max(len(tree.shapes), 10)
        self.seconds_per_tensor[candidate.name] = each


def measure(
    experiment: str,
    tree: Tree,
    candidates: Iterable[Candidate],
    settings: Settings,
    evaluations: bool = False,
) -> list[Row]:
    """Rows in the order of the candidates."""
    rows = {c.name: _row(experiment, tree, c, settings) for c in candidates}
    wanted = [c for c in candidates if not rows[c.name].note]
    for batch in _batches(wanted, tree, settings, rows):
        _measure_together(batch, tree, settings, rows, evaluations)
        gc.collect()
        if settings.devices.get("torch") == "cuda":
            import torch

            torch.cuda.empty_cache()
    return list(rows.values())


def _row(experiment: str, tree: Tree, candidate: Candidate, settings: Settings) -> Row:
    return Row(
        experiment,
        str(tree),
        len(tree.shapes),
        tree.size,
        tree.dtype,
        candidate.name,
        candidate.framework,
        settings.why_not(candidate, tree),
    )


def _batches(
    wanted: Sequence[Candidate], tree: Tree, settings: Settings, rows: dict[str, Row]
) -> list[list[Candidate]]:
    """All at once where memory has room for them; else one by one."""
    # Parameters, gradients, three arrays of state, two temporaries, all in float32.
    each = 7 * 4 * tree.size
    free = _free_memory(settings.devices)
    if each * len(wanted) + each <= free:
        return [list(wanted)] if wanted else []
    if 2 * each <= free:
        return [[candidate] for candidate in wanted]
    for candidate in wanted:
        rows[candidate.name].note = f"not run: needs {2 * each / 1e9:.0f} GB"
    return []


def _measure_together(
    batch: Sequence[Candidate],
    tree: Tree,
    settings: Settings,
    rows: dict[str, Row],
    evaluations: bool,
) -> None:
    runners: dict[str, Runner] = {}
    for candidate in batch:
        row = rows[candidate.name]
        runner_of = RUNNERS[candidate.framework]
        device = settings.devices[candidate.framework]
        try:
            with peers_warnings_aside(candidate):
                runner: Runner = runner_of(candidate, tree, device)
        except Exception as error:
            if candidate.ours:
                raise
            # A peer that does not run here is a result, not the end of the others'.
            row.note = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        settings.saw(candidate, tree, runner.first_seconds)
        row.first_seconds = runner.first_seconds
        row.state_bytes_per_parameter = runner.state_bytes / tree.size
        if runner.extra_bytes is not None:
            row.extra_bytes_per_parameter = runner.extra_bytes / tree.size
        runners[candidate.name] = runner
    if not runners:
        return

    framework = "torch" if "torch" in settings.devices else "jax"
    width = {"float32": 4, "bfloat16": 2}[tree.dtype]
    floor = Floor(7 * width * tree.size, settings.devices[framework], framework)
    timed: dict[str, Any] = {"floor": floor.steps}
    timed |= {name: runner.steps for name, runner in runners.items()}
    times = _interleaved(timed, settings)
    floor_ms = 1e3 * statistics.median(times["floor"])
    for name, runner in runners.items():
        row = rows[name]
        traffic = width * tree.size + 2 * (width * tree.size + runner.state_bytes)
        row.median_ms = 1e3 * statistics.median(times[name])
        row.minimum_ms = 1e3 * min(times[name])
        row.rounds = len(times[name])
        row.floor_ms = floor_ms * traffic / floor.traffic
        row.times_floor = row.median_ms / row.floor_ms
    if evaluations:
        for name, runner in runners.items():
            for what, timed_call in runner.evaluations().items():
                timed_call()
                seconds = [timed_call() for _ in range(settings.rounds)]
                rows[name].evaluation_ms[what] = 1e3 * statistics.median(seconds)


def _interleaved(
    timed: dict[str, Callable[[int], float]], settings: Settings
) -> dict[str, list[float]]:
    """Seconds a step, of every block of every name: A B C, C B A, A B C ...

    What stands before a block costs it time: caches, the other framework's threads. So
    a block begins with a step that is not timed, and every second round goes backwards.
    """
    counts = {}
    for name, steps in timed.items():
        seconds = max(steps(1), 1e-7)
        # A block lasts a share of the time that the rounds have, one step at least.
        counts[name] = max(1, int(settings.seconds / settings.rounds / seconds))
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(settings.rounds):
        for name in reversed(timed) if round_ % 2 else timed:
            timed[name](1)
            times[name].append(timed[name](counts[name]))
    return times


def _free_memory(devices: dict[str, str]) -> int:
    if devices.get("torch") == "cuda":
        import torch

        return int(0.9 * torch.cuda.mem_get_info()[0])
    if "cpu" in devices.values():
        return int(0.7 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    import jax

    statistics_of_device = jax.devices(devices["jax"])[0].memory_stats() or {}
    limit = statistics_of_device.get("bytes_limit", 16 * 2**30)
    return int(0.9 * (limit - statistics_of_device.get("bytes_in_use", 0)))
