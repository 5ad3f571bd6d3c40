"""The matrix as a table: a row per case, per pair of voices, or per optimizer."""

from collections.abc import Collection, Iterable

from rich.table import Column, Table
from rich.text import Text

from parity_tests.compare.harness import Outcome
from parity_tests.registry.case import Case
from parity_tests.runners.voices import VOICES

# Each column: a package, and the yardsticks of which it shows the worst. Golden files
# stand in for what Meta's package does not have.
COLUMNS = (
    ("sf_jax", ("reference",)),
    ("sf_torch", ("reference",)),
    ("meta", ("reference",)),
    ("optax", ("reference",)),
    ("sf_jax", ("meta", "golden")),
    ("sf_torch", ("meta", "golden")),
    ("sf_jax", ("torch",)),
)
WIDTH = 190  # of the whole table
# Of the table by optimizer: a package, and its yardstick.
PAIRS = (
    ("sf_jax", "reference"),
    ("sf_torch", "reference"),
    ("meta", "reference"),
    ("sf_jax", "meta"),
    ("sf_torch", "meta"),
    ("sf_jax", "torch"),
)
_SHOWN = {
    "sf_jax": "sf_jax",
    "sf_torch": "sf_torch",
    "torch": "sf_torch",
    "meta": "Meta's",
    "reference": "float64",
}


def worst(
    outcomes: Iterable[Outcome], package: str, against: Collection[str]
) -> Outcome | None:
    """The worst outcome of a package's voices against the yardsticks in ``against``."""
    fitting = [
        o
        for o in outcomes
        if VOICES[o.voice].package == package and o.against in against
    ]
    return max(fitting, key=lambda o: (not o.ok, o.distance), default=None)


def _cell(o: Outcome) -> Text:
    style = "bold red" if not o.ok else "yellow" if o.limit.differs else ""
    return Text(str(o.distance), style=style)


def table(outcomes: list[Outcome], every_pair: bool = False) -> Table:
    """A row per case, or per pair of voices."""
    if every_pair:
        heads = ("case", "voice", "against", "ulps", "where", "limit")
        rows = Table(*(Column(head, overflow="fold") for head in heads))
        for o in outcomes:
            d = o.distance
            rows.add_row(
                o.case,
                o.voice,
                o.against,
                Text(f"{d.ulps:.2f}", style="" if o.ok else "bold red"),
                f"{d.sequence}.{d.leaf}@{d.step}" if d.leaf else "",
                f"{'>' if o.limit.differs else ''}{o.limit.ulps:.4g}",
            )
        return rows
    title = "ulps, and where: sequence.leaf@step of the worst voice"
    names = (f"{a} - {' or '.join(b)}" for a, b in COLUMNS)
    # Folded, a cell keeps its step where the terminal is narrow.
    columns = (Column(name, overflow="fold") for name in names)
    rows = Table(Column("case", no_wrap=True), *columns, title=title)
    by_case: dict[str, list[Outcome]] = {}
    for o in outcomes:
        by_case.setdefault(o.case, []).append(o)
    for name, of_case in by_case.items():
        cells = []
        for column in COLUMNS:
            furthest = worst(of_case, *column)
            cells.append(_cell(furthest) if furthest else Text("–"))
        rows.add_row(name, *cells)
    return rows


def by_optimizer(outcomes: Iterable[Outcome], cases: Iterable[Case]) -> str:
    """The worst distances of each optimizer's float32 cases, in Markdown.

    Outcomes that have to differ are left out.
    """
    optimizers = {c.name: c.optimizer.name for c in cases if c.dtype == "float32"}
    of_optimizer: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if o.case in optimizers and not o.limit.differs:
            of_optimizer.setdefault(optimizers[o.case], []).append(o)
    heads = [f"{_SHOWN[package]} – {_SHOWN[against]}" for package, against in PAIRS]
    lines = [["optimizer", "cases", *heads], ["---", *["--:"] * (1 + len(PAIRS))]]
    for name, found in of_optimizer.items():
        furthest = [worst(found, package, (against,)) for package, against in PAIRS]
        cells = [f"{o.distance.ulps:.1f}" if o else "–" for o in furthest]
        lines.append([name, str(len({o.case for o in found})), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
