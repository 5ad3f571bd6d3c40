"""Checks a recorded PyTorch run against sf_jax and the float64 reference.

    sf-parity replay run.safetensors
    sf-parity replay run.safetensors --set warmup_steps=500 --set b1=0.95

Both start from the state in which the recording began, take the gradients that
``sf_torch.record`` wrote down, and are compared with the recorded y and x. Where they
differ, the reference is run again under each of :data:`HYPOTHESES`. The hypothesis
under which it agrees with the recorded run is the likely reason.

The recorded options are used, unless ``--set`` gives those that you have in JAX. What
differs from the record is then listed, and may be the reason.
"""

import argparse
import ast
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import sf_jax
from parity_tests import reference
from parity_tests.compare import tolerances
from parity_tests.compare.hypotheses import HYPOTHESES, Hypothesis, as_recorded, plain
from parity_tests.reference import Leaves, wide
from parity_tests.registry import OPTIMIZERS
from parity_tests.runners.recorded_run import Group, Run, refusing
from sf_jax import torch_checkpoint

# The limits of tolerances.py are for runs of 300 steps. Rounding grows with the steps.
_LIMIT_STEPS = 300
# They are for small trees, too. The worst of 1e8 weights is further off by chance than
# the worst of 50. A real difference is thousands of ulps.
_ROOM = 4
# A hypothesis that leaves the limit is still the likely reason if it comes this many
# times closer.
_CLEARLY_CLOSER = 30


@dataclasses.dataclass
class Worst:
    """The largest distance from a recorded run, and where it first left the limit."""

    limit: float  # in ulps, up to _LIMIT_STEPS; it grows in proportion after that
    ratio: float = 0.0  # the largest distance as a multiple of the limit
    ulps: float = 0.0  # the distance there
    where: str = ""
    parted: str = ""  # the first place beyond the limit; empty if there is none
    compared: int = 0  # numbers that were compared

    def see(self, ulps: float, step: int, what: str) -> None:
        ratio = ulps / (self.limit * max(1.0, step / _LIMIT_STEPS))
        where = f"step {step}, {what}"
        if not ratio <= 1 and not self.parted:
            self.parted = where
        if not ratio <= self.ratio:  # NaN counts as infinitely far
            self.ratio = np.inf if np.isnan(ratio) else ratio
            self.ulps, self.where = ulps, where

    @property
    def ok(self) -> bool:
        return not self.parted


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a replay."""

    optimizer: str
    steps: int
    limit: float
    jax: Worst
    reference: Worst
    gaps_apart: bool  # whether leaves with counts of their own missed gradients
    hypotheses: tuple[tuple[Hypothesis, Worst], ...]  # the best first; none if ok
    differing: Mapping[str, Any]  # settings that are not the record's; its values
    changes: tuple[str, ...]  # options that changed during the recorded run

    @property
    def ok(self) -> bool:
        return self.jax.ok and self.reference.ok

    @property
    def reason(self) -> str | None:
        """The likely reason for what differs."""
        if self.gaps_apart and self.reference.ok and not self.jax.ok:
            return (
                "a parameter had no gradient at some steps; PyTorch corrects bias by "
                "each parameter's own count, JAX by one for all (and PyTorch too, with "
                "upstream_compatible=True)"
            )
        if self.changes and not self.ok:
            return f"{self.changes[0]}; JAX takes one value for a whole run"
        if not self.hypotheses:
            return None
        best, worst = self.hypotheses[0]
        if worst.ok or worst.ratio * _CLEARLY_CLOSER < self.reference.ratio:
            return best.reason
        return None


def replay(
    path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None
) -> Verdict:
    """Drives sf_jax and the reference with a recorded run.

    Args:
      path: a file of ``sf_torch.record``.
      settings: options to use in place of the recorded ones, by their names in
        :class:`~parity_tests.registry.options.Options`.

    Returns:
      How far each went from the recorded run, and the hypotheses, the best first,
      where that was too far.

    Raises:
      ValueError: no recorded run, or one of an optimizer without a reference, or one
        with nothing to compare, or a setting that is unknown.
    """
    run = Run(path)
    recorded = run.groups
    differing = run.set(settings or {})
    dtype = "float64" if run.is_double else "float32"
    limit = _ROOM * tolerances.limit(dtype, "meta", "torch").ulps
    with refusing(path), jax.enable_x64(run.is_double):
        voices: list[Any] = [_InJax(run), _InReference(run, Hypothesis("", plain))]
        jax_worst, reference_worst = _drive(run, voices, [limit, limit])
    if not reference_worst.compared:
        raise ValueError(
            f"{path} has nothing to compare: no y or x with elements in its "
            f"{run.steps} steps. Record with a smaller every, or call evaluated()."
        )
    apart = {n for group in run.groups if group.counts_apart for n in group.names}
    gaps_apart = any(
        kind == "step" and apart - grads.keys() for kind, _, grads, _, _ in run.frames()
    )
    found = []
    if not (jax_worst.ok and reference_worst.ok):
        possible = [*as_recorded(recorded, differing), *HYPOTHESES]
        possible = [h for h in possible if any(map(h.seams, run.groups))]
        limits = [limit * h.coarser(run.groups) for h in possible]
        with refusing(path):
            worsts = _drive(run, [_InReference(run, h) for h in possible], limits)
        found = sorted(
            zip(possible, worsts, strict=True), key=lambda pair: pair[1].ratio
        )
    return Verdict(
        run.optimizer,
        run.steps,
        limit,
        jax_worst,
        reference_worst,
        gaps_apart,
        tuple(found),
        differing,
        tuple(run.changes),
    )


def _drive(run: Run, voices: list[Any], limits: list[float]) -> list[Worst]:
    worsts = [Worst(limit) for limit in limits]
    for kind, step, grads, y, x in run.frames():
        evaluated = kind == "evaluated"
        for voice, worst in zip(voices, worsts, strict=True):
            if not evaluated:
                voice.step(grads)
            for sequence, recorded in (("y", y), ("x", x)):
                if not recorded:
                    continue
                ours = voice.get("evaluated" if evaluated else sequence)
                what = "weights evaluated" if evaluated else sequence
                for name, leaf in recorded.items():
                    worst.compared += leaf.size
                    worst.see(_ulps(leaf, ours[name]), step, f"{what}, {name}")
    return worsts


class _InReference:
    def __init__(self, run: Run, hypothesis: Hypothesis) -> None:
        self.hypothesis = hypothesis
        # Where evaluated weights were recorded, these show whether y was taken for x;
        # otherwise the recorded x is what was evaluated.
        self.taken_for_x = ("evaluated",) if run.has_evaluated else ("x",)
        groups = [
            (group.names, hypothesis.seams(group) or plain(group))
            for group in run.groups
        ]
        self.optimizer = reference.ScheduleFree(run.start, groups)
        _resume(self.optimizer, run)

    def step(self, grads: Leaves) -> None:
        optimizer = self.optimizer
        optimizer.step(grads)

    def get(self, sequence: str) -> Leaves:
        if self.hypothesis.x_is_y and sequence in self.taken_for_x:
            return self.optimizer.y
        return self.optimizer.y if sequence == "y" else self.optimizer.x


def _resume(optimizer: reference.ScheduleFree, run: Run) -> None:
    """Gives the reference the state in which the recording began."""
    optimizer.k = run.k
    optimizer.x.update({n: wide(leaf) for n, leaf in run.start_x.items()})
    optimizer.z.update({n: wide(leaf) for n, leaf in run.state["z"].items()})
    for (names, seams), saved in zip(optimizer.groups, run.saved_groups, strict=True):
        average: Any = seams.average
        while hasattr(average, "memory"):
            average = average.memory
        average.lr_max = max(float(saved.get("lr_max", 0.0)), 0.0)
        average.weight_sum = float(saved.get("weight_sum", 0.0))
        if hasattr(seams.base, "t"):
            seams.base.t = {n: run.k - run.missed.get(n, 0) for n in names}
        for ours, theirs in (
            ("v", "exp_avg_sq"),
            ("m", "exp_avg"),
            ("b", "momentum_buffer"),
        ):
            if hasattr(seams.base, ours):
                getattr(seams.base, ours).update(
                    {
                        n: wide(run.state[theirs][n])
                        for n in names
                        if n in run.state[theirs]
                    }
                )


@functools.lru_cache(maxsize=16)
def _jax_step(groups: tuple[Group, ...]) -> tuple[Any, Any]:
    """The transformation, and a jitted step that also returns y and x unrounded."""

    def build(group: Group) -> Any:
        return OPTIMIZERS[group.optimizer].jax(group.options, False)

    tx = optax.with_extra_args_support(build(groups[0]))
    if len(groups) > 1:
        labels = {name: str(i) for i, g in enumerate(groups) for name in g.names}
        tx = optax.partition({str(i): build(g) for i, g in enumerate(groups)}, labels)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, ...]:
        filled = {n: grads.get(n, jnp.zeros_like(p)) for n, p in params.items()}
        updates, moved = tx.update(filled, state, params)
        new_params = optax.apply_updates(params, updates)

        def unless_missing(path: Any, old: Any, new: Any) -> Any:
            # In PyTorch a parameter without a gradient and its state do not change.
            name = getattr(path[-1], "key", None) if path else None
            return old if name in params and name not in grads else new

        params = jax.tree.map_with_path(unless_missing, params, new_params)
        state = jax.tree.map_with_path(unless_missing, state, moved)
        x = sf_jax.eval_params(state, jax.tree.map(_at_least_float32, params))
        in_full = sf_jax.train_params(state, x)
        # A bfloat16 parameter holds y rounded by optax; the state has y unrounded.
        y = {n: in_full[n] if p.dtype == jnp.bfloat16 else p for n, p in params.items()}
        return params, state, {"y": y, "x": x}

    return tx, jax.jit(step)


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


class _InJax:
    def __init__(self, run: Run) -> None:
        tx, self.jitted = _jax_step(tuple(run.groups))
        self.params = {name: jnp.asarray(y) for name, y in run.start.items()}
        self.state = tx.init(self.params)
        if run.k:
            self._resume(run)

    def _resume(self, run: Run) -> None:
        index = {name: i for i, name in enumerate(run.start)}
        state: dict[int, dict[str, np.ndarray]] = {
            i: {key: of[name] for key, of in run.state.items() if name in of}
            for name, i in index.items()
        }
        for name, i in index.items():
            if self.params[name].dtype == jnp.bfloat16:
                state[i]["x"] = run.start_x[name]
        groups = [
            {**group, "params": [index[name] for name in group["params"]]}
            for group in run.saved_groups
        ]
        self.params, self.state, _ = torch_checkpoint.from_torch(
            run.start,
            {"state": state, "param_groups": groups},
            self.params,
            self.state,
            names=[torch_checkpoint.Leaf(name, name) for name in run.start],
            param_names=[name for group in run.groups for name in group.names],
            model_holds="y",
            unmoved=[name for name, i in index.items() if "z" not in state[i]],
        )

    def step(self, grads: Leaves) -> None:
        self.params, self.state, self.now = self.jitted(self.params, self.state, grads)

    def get(self, sequence: str) -> Leaves:
        leaves = self.now["y" if sequence == "y" else "x"]
        return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def _ulps(recorded: np.ndarray, ours: np.ndarray) -> float:
    """The distance in ulps, less the rounding to bfloat16 where that was recorded."""
    if not recorded.size:
        return 0.0
    a, b = wide(recorded), wide(ours)
    apart = np.abs(a - b)
    if recorded.dtype == ml_dtypes.bfloat16:
        spacing = np.ldexp(1.0, np.frexp(np.abs(b))[1] - 8)  # 8 binary digits
        apart = np.maximum(apart - spacing / 2, 0)
    dtype = "float64" if recorded.dtype == np.float64 else "float32"
    return float(apart.max() / (tolerances.eps(dtype) * max(1.0, np.abs(b).max())))


def show(verdict: Verdict, console: Console) -> None:
    """Prints a verdict as tables."""
    console.print(
        f"{verdict.optimizer}, {verdict.steps} steps. Up to {verdict.limit:.1f} ulps "
        f"apart may be rounding, and as many more every {_LIMIT_STEPS} steps."
    )
    table = Table("against", "first beyond it", "at worst, ulps", "at")
    for name, worst in (("sf_jax", verdict.jax), ("reference", verdict.reference)):
        table.add_row(name, *_row(worst))
    console.print(table)
    for name, value in verdict.differing.items():
        console.print(f"Not as recorded: {name}, which was {value}.", markup=False)
    if verdict.ok:
        console.print("The run is the one that JAX and the reference take.")
        return
    table = Table("if, in the recorded run, ...", "first beyond it", "ulps", "at")
    for hypothesis, worst in verdict.hypotheses:
        table.add_row(hypothesis.reason, *_row(worst))
    console.print(table)
    console.print(
        f"Likely reason: {verdict.reason}."
        if verdict.reason
        else "None of these is the reason."
    )


def _row(worst: Worst) -> tuple[str, str, str]:
    return worst.parted or "never", f"{worst.ulps:.3g}", worst.where


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="what sf_torch.record wrote")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=_setting,
        help="an option as you have it in JAX, in place of the recorded one",
    )


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a word, as in decay_at=z
        return name, value


def run(arguments: argparse.Namespace) -> int:
    return main(arguments.file, settings=dict(arguments.set))


def main(
    path: str | os.PathLike[str],
    console: Console | None = None,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Replays a file and prints the verdict.

    Returns:
      The exit code: 0 within tolerance, 1 when not, 2 if it can't be replayed.
    """
    console = console or Console()
    try:
        verdict = replay(path, settings)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 2
    show(verdict, console)
    return 0 if verdict.ok else 1
