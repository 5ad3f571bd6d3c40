"""The report of a matrix: one self-contained page with table and plots, and JSON."""

import io
import json
import math
import pathlib
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parity_tests.cli.table import by_optimizer
from parity_tests.compare.distance import curve
from parity_tests.compare.harness import Outcome
from parity_tests.registry.case import Case
from parity_tests.runners.trajectory import SEQUENCES
from parity_tests.runners.voices import VOICES, run

_PACKAGES = ("jax", "optax", "torch", "schedulefree", "numpy")
_COLOURS = {"sf_jax": "#3b6fd4", "sf_torch": "#e2621b", "meta": "#8a919c"}
_PAGE = pathlib.Path(__file__).with_name("report.html")
_VOICES_SHOWN = {"meta": "schedulefree", "torch": "sf_torch", "jax scan": "sf_jax"}
_CURVES = ("adamw/together", "sgd/together", "radam/together", "adamw/network")


def write(
    folder: pathlib.Path,
    cases: Sequence[Case],
    outcomes: Sequence[Outcome],
    skipped: Sequence[tuple[str, str]],
    *,
    device: str,
    steps: int | None,
    seconds: float,
) -> pathlib.Path:
    """Writes ``index.html``, ``summary.json`` and ``distances.md``.

    Returns:
      The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": device,
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in _PACKAGES},
    }
    summary = {
        **facts,
        "ok": all(o.ok for o in outcomes),
        "worst": [
            {"package": a, "against": b, **_as_row(o)}
            for (a, b), o in worst_by_package(outcomes).items()
        ],
        "comparisons": [_as_row(o) for o in outcomes],
        "skipped": [{"what": what, "reason": reason} for what, reason in skipped],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "distances.md").write_text(by_optimizer(outcomes, cases))
    known = [o for o in outcomes if o.limit.differs]
    figures = (
        (
            "shares",
            "The worst distance of each case, as a share of its limit",
            "A dot is the worst of a package's voices in a case; right of the red line "
            "it would be too far.",
            _shares,
        ),
        (
            "curves",
            "Distance from the reference, step by step",
            "A line that keeps rising is a difference; rounding goes up and down.",
            _curves,
        ),
    )
    page = (
        _environment()
        .from_string(_PAGE.read_text(encoding="utf-8"))
        .render(
            facts=facts,
            ok=summary["ok"],
            known=known,
            worst=worst_by_package(outcomes),
            outcomes=outcomes,
            skipped=skipped,
            figures=figures if outcomes else (),
            draw=lambda plot: _svg(plot, cases, outcomes, steps),
        )
    )
    path = folder / "index.html"
    path.write_text(page)
    return path


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def worst_by_package(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Outcome]:
    """By (package, yardstick) the outcome that is largest as a share of its limit."""
    found: dict[tuple[str, str], Outcome] = {}
    for o in outcomes:
        key = VOICES[o.voice].package, o.against
        if not o.limit.differs and _share(o) >= _share(found.get(key)):
            found[key] = o
    return found


def _share(o: Outcome | None) -> float:
    return -1.0 if o is None else o.distance.ulps / o.limit.ulps


def _as_row(o: Outcome) -> dict[str, Any]:
    d = o.distance
    return {
        "case": o.case,
        "voice": o.voice,
        "against": o.against,
        "ulps": d.ulps if math.isfinite(d.ulps) else None,  # JSON has no infinity
        "sequence": d.sequence,
        "leaf": d.leaf,
        "step": d.step,
        "limit_ulps": o.limit.ulps,
        "must_differ": o.limit.differs,
        "reason": o.limit.reason,
        "ok": o.ok,
    }


def _svg(
    plot: Any, cases: Sequence[Case], outcomes: Sequence[Outcome], steps: int | None
) -> str:
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 9}):
        figure = plot(cases, outcomes, steps)
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _shares(
    cases: Sequence[Case], outcomes: Sequence[Outcome], steps: int | None
) -> Figure:
    """A plot with a row a case: sf_jax and sf_torch against the reference and Meta."""
    names = [case.name for case in cases]
    figure = Figure(figsize=(9, 1.2 + 0.21 * len(names)), layout="constrained")
    for ax, against in zip(
        figure.subplots(1, 2, sharey=True), ("reference", "meta"), strict=True
    ):
        for package in ("sf_jax", "sf_torch"):
            share: dict[str, float] = {}
            for o in outcomes:
                if (VOICES[o.voice].package, o.against) == (package, against):
                    share[o.case] = max(share.get(o.case, 0), _share(o))
            rows = [names.index(name) for name in share]
            colour = _COLOURS[package]
            ax.scatter(share.values(), rows, s=14, label=package, color=colour)
        ax.axvline(1, color="#c0392b", lw=1, label="the limit")
        ax.set(xlim=(0, None), title=f"against {against}", xlabel="share of the limit")
        ax.grid(axis="y", lw=0.3)
        _bare(ax)
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.axes[0].set_ylim(len(names), -1)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", ncols=len(labels), frameon=False
    )
    return figure


def _curves(
    cases: Sequence[Case], outcomes: Sequence[Outcome], steps: int | None
) -> Figure:
    """Plots the distances of y, x and z by step, for a few cases of those that ran."""
    ran = {(o.case, o.voice) for o in outcomes}
    shown = [case for case in cases if case.name in _CURVES] or list(cases)[:4]
    figure = Figure(figsize=(9, 0.5 + 2.1 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 3, squeeze=False, sharex=True, sharey="row")
    for row, case in zip(grid, shown, strict=True):
        yardstick = run(case, "reference", steps)
        for ax, sequence in zip(row, SEQUENCES, strict=True):
            for voice in _VOICES_SHOWN:
                if (case.name, voice) not in ran:
                    continue
                ulps = curve(run(case, voice, steps), yardstick, case.dtype, sequence)
                package = VOICES[voice].package
                label = _VOICES_SHOWN[voice]
                ax.plot(np.nan_to_num(ulps), lw=1, color=_COLOURS[package], label=label)
            ax.set_title(f"{case.name}: {sequence}", loc="left", fontsize=9)
            _bare(ax)
        row[0].set_ylabel("distance, ulps")
    for ax in grid[-1]:
        ax.set_xlabel("step")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    return figure


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
