"""The results as a table on the screen, as Markdown, JSON and pictures."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.candidates import CANDIDATES
from benchmarks.measure import Row

STEPS, LEAVES, PARAMETERS = "steps", "leaves", "parameters"
OURS = {candidate.name for candidate in CANDIDATES if candidate.ours}

COLUMNS = (
    "",
    "ms",
    "least ms",
    "x floor",
    "state B/param",
    "extra B/param",
    "start s",
    "finding x, ms",
)


def show(rows: Sequence[Row], machine: str, console: Console | None = None) -> None:
    console = console or Console(width=140)
    for title, group in _by_tree(rows):
        table = Table(title=title, caption=machine, title_justify="left")
        last = len(COLUMNS) - 1
        for index, column in enumerate(COLUMNS):
            justify: Any = "left" if index in (0, last) else "right"
            table.add_column(column, justify=justify, no_wrap=index != last)
        for row in group:
            style = "bold" if row.candidate in OURS else None
            table.add_row(*_cells(row), style=style)
        console.print(table)


def write(
    directory: Path, rows: Sequence[Row], about: dict[str, Any], seconds: float
) -> None:
    """All rows, and the picture of the last one's experiment: others are as before."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        **about,
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (directory / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (directory / "results.md").write_text(markdown(rows, about))
    last = rows[-1].experiment
    _plot(directory, last, [r for r in rows if r.experiment == last], about["machine"])


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    where = f"{about['machine']}, at {about['commit']}"
    lines = [f"`{about['command']}` on {where}; {versions}."]
    lines += ["", *summary(rows)]
    for title, group in _by_tree(rows):
        lines += ["", f"**{title}**", "", _line(COLUMNS), _line("-" * len(COLUMNS))]
        for row in group:
            cells = _cells(row)
            if row.candidate in OURS:
                cells[0] = f"**{cells[0]}**"
            lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """A table of all trees of the steps: milliseconds, and how many floors they are."""
    steps = [row for row in rows if row.experiment == STEPS]
    trees = list(dict.fromkeys(row.tree for row in steps))
    lines = [
        _line(["ms a step (x floor)", *trees]),
        _line(["---", *["--:"] * len(trees)]),
    ]
    for name in dict.fromkeys(row.candidate for row in steps):
        of_tree = {row.tree: row for row in steps if row.candidate == name}
        times = [_time(of_tree.get(tree)) for tree in trees]
        lines.append(_line([f"**{name}**" if name in OURS else name, *times]))
    return lines


def _time(row: Row | None) -> str:
    if row is None or row.median_ms is None:
        return "–"
    return f"{row.median_ms:.3g} ({row.times_floor:.1f}x)"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    if row.note:
        return [row.candidate, *[""] * (len(COLUMNS) - 2), row.note]
    x = ", ".join(f"{what}: {ms:.2f}" for what, ms in row.evaluation_ms.items())
    return [
        row.candidate,
        _number(row.median_ms, 3),
        _number(row.minimum_ms, 3),
        _number(row.times_floor, 2),
        _number(row.state_bytes_per_parameter, 1),
        _number(row.extra_bytes_per_parameter, 1),
        _number(row.first_seconds, 2),
        x,
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _by_tree(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of a tree, under a title with its floor."""
    for key in dict.fromkeys((row.experiment, row.tree) for row in rows):
        group = [row for row in rows if (row.experiment, row.tree) == key]
        # Of those without a float32 copy of half-precision parameters.
        floors = [row.floor_ms for row in group if row.floor_ms is not None]
        floor = f"; least floor {min(floors):.3f} ms" if floors else ""
        yield f"{key[0]} | {key[1]}{floor}".replace(" | ", ", "), group


def _plot(directory: Path, experiment: str, rows: Sequence[Row], machine: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    draw = {
        STEPS: _bars,
        LEAVES: _growth("tensors", "tensors of 1K"),
        PARAMETERS: _growth("parameters", "parameters in one tensor"),
    }[experiment]
    measured = [row for row in rows if row.median_ms]
    if measured:
        draw(directory / f"{experiment}.png", measured, machine)


def _bars(path: Path, rows: Sequence[Row], machine: str) -> None:
    from matplotlib import pyplot as plt

    trees = list(dict.fromkeys(row.tree for row in rows))
    height = 1.2 + sum(0.28 * sum(r.tree == t for r in rows) + 0.9 for t in trees)
    figure, axes = plt.subplots(
        len(trees),
        1,
        figsize=(9, height),
        squeeze=False,
        layout="constrained",
        height_ratios=[sum(r.tree == t for r in rows) for t in trees],
    )
    for tree, axis in zip(trees, axes[:, 0], strict=True):
        group = [row for row in rows if row.tree == tree][::-1]
        ratios = [row.times_floor or 0.0 for row in group]
        colors = ["C0" if row.candidate in OURS else "0.7" for row in group]
        bars = axis.barh([row.candidate for row in group], ratios, color=colors)
        labels = [f"{r.times_floor:.2f}x, {r.median_ms:,.2f} ms" for r in group]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.margins(x=0.25)
        axis.set_title(tree, fontsize=10, loc="left")
    axes[-1, 0].set_xlabel("time of a step, in floors (in-place add of as many bytes)")
    figure.suptitle(f"AdamW steps on {machine}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _growth(of: str, label: str) -> Any:
    def draw(path: Path, rows: Sequence[Row], machine: str) -> None:
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name in dict.fromkeys(row.candidate for row in rows):
            group = [row for row in rows if row.candidate == name]
            xs = [getattr(row, of) for row in group]
            style = "-o" if name in OURS else "--o"
            axis.loglog(xs, [row.median_ms for row in group], style, ms=4, label=name)
        best = {getattr(row, of): row.floor_ms for row in rows}
        axis.loglog(list(best), list(best.values()), "k:", label="floor")
        axis.set(xlabel=label, ylabel="ms a step", title=f"AdamW steps on {machine}")
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    return draw
