"""What the digits demo records, and the figure and page that it makes of it."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

LIMIT_ULPS = 64  # what the demo promises for equal gradients

FLAX, TORCH = "#3b6fd4", "#e2621b"
SEQUENCES = {"y": "#7a4fbf", "x": "#12897b", "z": "#c98a00"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": "#4a515c",
    "xtick.color": "#4a515c",
    "ytick.color": "#4a515c",
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass
class Record:
    """Everything measured on the way; lists hold one number a step unless said."""

    steps_per_epoch: int
    flax_loss: list[float] = field(default_factory=list)
    torch_loss: list[float] = field(default_factory=list)
    flax_accuracy: list[float] = field(default_factory=list)  # one an epoch
    torch_accuracy: list[float] = field(default_factory=list)  # one an epoch
    # Distance of y between the two runs, each on gradients of its own.
    own_gradients: list[float] = field(default_factory=list)
    # Distance of y, x and z on the same gradients.
    equal_gradients: dict[str, list[float]] = field(
        default_factory=lambda: {"y": [], "x": [], "z": []}
    )


def plot_loss(ax: Axes, record: Record) -> None:
    per_epoch = record.steps_per_epoch
    for label, losses, colour, line in (
        ("Flax", record.flax_loss, FLAX, {"lw": 3.5, "alpha": 0.55}),
        ("PyTorch", record.torch_loss, TORCH, {"lw": 1.5, "ls": (0, (4, 2))}),
    ):
        steps = np.arange(1, len(losses) + 1) / per_epoch
        means = np.reshape(losses, (-1, per_epoch)).mean(1)
        ax.plot(steps, losses, color=colour, lw=0.6, alpha=0.25)
        ax.plot(np.arange(len(means)) + 0.5, means, color=colour, label=label, **line)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title="Training loss at y", xlabel="epoch", ylabel="cross-entropy, nats")
    ax.legend()


def plot_accuracy(ax: Axes, record: Record) -> None:
    epochs = np.arange(1, len(record.flax_accuracy) + 1)
    ax.plot(epochs, record.flax_accuracy, color=FLAX, lw=3.5, alpha=0.55, label="Flax")
    ax.plot(
        epochs,
        record.torch_accuracy,
        color=TORCH,
        lw=1.5,
        ls=(0, (4, 2)),
        label="PyTorch",
    )
    worst = min(*record.flax_accuracy, *record.torch_accuracy)
    ax.set_ylim(min(0.9, worst - 0.01), 1.002)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f}%"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(title="Test accuracy at x", xlabel="epoch", ylabel="correct")
    ax.legend(loc="lower right")


def plot_distance(ax: Axes, record: Record) -> None:
    def line(distances: list[float], **look: Any) -> None:
        # Zero, which the first steps often reach, has no place on a log scale.
        shown = np.where(np.array(distances) > 0, distances, np.nan)
        ax.plot(np.arange(1, len(shown) + 1), shown, **look)

    line(
        record.own_gradients,
        color="#b3b8c0",
        lw=1.2,
        label="y, gradients of each framework's own",
    )
    for name, distances in record.equal_gradients.items():
        line(distances, color=SEQUENCES[name], lw=1.4, label=f"{name}, equal gradients")
    ax.axhline(LIMIT_ULPS, color="#b4232a", lw=1, ls=(0, (2, 2)))
    ax.text(
        len(record.own_gradients),
        LIMIT_ULPS * 1.2,
        f"limit, {LIMIT_ULPS}",
        color="#b4232a",
        fontsize=9,
        ha="right",
        va="bottom",
    )
    ax.set_yscale("log")
    ax.set(
        title="Flax against PyTorch, distance in ulps",
        xlabel="step",
        ylabel=r"units of $2^{-23}\,\max(1, \max|w|)$",
    )
    # Below, where no line is.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def write_figure(path: Path, record: Record) -> None:
    """All three plots side by side, as PNG."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 3, figsize=(13.5, 4), width_ratios=(1, 1, 1.35), layout="constrained"
        )
        plots = (plot_loss, plot_accuracy, plot_distance)
        for ax, plot in zip(axes, plots, strict=True):
            plot(ax, record)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def as_svg(plot: Callable[[Axes, Record], None], record: Record, width: float) -> str:
    """One plot as the text of a data URI, for a page without other files."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(width, 3.8), layout="constrained")
        plot(ax, record)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(path: Path, record: Record, summary: dict[str, Any]) -> None:
    """The whole run on one self-contained page."""
    page = Environment(autoescape=True).from_string(PAGE)
    path.write_text(
        page.render(
            s=summary,
            limit=LIMIT_ULPS,
            own=max(record.own_gradients),
            loss=as_svg(plot_loss, record, 5.4),
            accuracy=as_svg(plot_accuracy, record, 5.4),
            distance=as_svg(plot_distance, record, 11),
            epochs=list(zip(record.flax_accuracy, record.torch_accuracy, strict=True)),
            losses=[
                np.reshape(loss, (-1, record.steps_per_epoch)).mean(1)
                for loss in (record.flax_loss, record.torch_loss)
            ],
        )
    )


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Schedule-Free in Flax and PyTorch: digits</title>
<style>
  :root { --ink: #1c2128; --soft: #5b6470; --line: #e2e5ea; --back: #f6f7f9; }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--back); color: var(--ink);
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
  main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
  h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; }
  h2 { font-size: 19px; margin: 40px 0 8px; }
  p { max-width: 84ch; margin: 0 0 12px; }
  sup { line-height: 0; }
  .soft { color: var(--soft); }
  .cards { display: grid; gap: 12px; margin: 24px 0;
           grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
  .card, figure { background: #fff; border: 1px solid var(--line);
                  border-radius: 8px; }
  .card { padding: 14px 16px; }
  .card b { display: block; font-size: 25px; font-variant-numeric: tabular-nums; }
  .card span { color: var(--soft); font-size: 13.5px; }
  figure { margin: 0 0 12px; padding: 12px; }
  figure img { display: block; width: 100%; height: auto; }
  figcaption { color: var(--soft); font-size: 13.5px; }
  nav a { margin-right: 1rem; }
  @media print { body { background: none; } main { max-width: none; padding: 0; }
                 figure, .card { break-inside: avoid; } nav { display: none; } }
  .pair { display: grid; gap: 12px;
          grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: 3px 18px 3px 0; text-align: right; font-size: 14.5px; }
  th { font-weight: 600; border-bottom: 1px solid var(--line); }
  .text td, .text th { text-align: left; }
  code { font-size: 0.92em; }
  details { margin-top: 8px; }
  summary { cursor: pointer; }
</style>
<main>
<h1>One network, two frameworks, the same optimizer</h1>
<p class="soft">A small convolutional network with BatchNorm on scikit-learn's digits,
trained with <code>sf_jax.schedule_free_adamw</code> in Flax and with
<code>sf_torch.AdamWScheduleFree</code> in PyTorch, from the same initial weights, on
the same batches: {{ s.steps }} steps, {{ s.seconds }} seconds on a
{{ s.machine }} CPU.</p>

<div class="cards">
  <div class="card"><b>{{ "%.2f"|format(100 * s.jax_eval_accuracy) }}%</b>
    <span>test accuracy at x, Flax</span></div>
  <div class="card"><b>{{ "%.2f"|format(100 * s.torch_eval_accuracy) }}%</b>
    <span>test accuracy at x, PyTorch</span></div>
  {% for n in "yxz" %}
  <div class="card"><b>{{ "%.1f"|format(s["max_ulps_" ~ n]) }}</b>
    <span>ulps between the {{ n }} of the two, at worst</span></div>
  {% endfor %}
</div>

<nav><a href="#training">Training</a><a href="#apart">How far apart</a>
<a href="#numbers">Numbers</a></nav>

<h2 id="training">Training</h2>
<p>The gradient, and so the loss, is taken at y. The weights to evaluate and to ship
are x, the average; BatchNorm's statistics are recomputed for them. No learning rate
schedule: after the warmup the step size stays where it is.</p>
<div class="pair">
  <figure><img src="{{ loss }}"
    alt="Training loss at y over the epochs, Flax and PyTorch">
    <figcaption>Thin: every step. Thick: the mean of an epoch.</figcaption></figure>
  <figure><img src="{{ accuracy }}"
    alt="Test accuracy at x over the epochs, Flax and PyTorch">
    <figcaption>Of images that were not trained on.</figcaption></figure>
</div>

<h2 id="apart">How far apart</h2>
<p>The grey line compares the two runs above. Each network rounds in its own way,
training amplifies the difference, and it reaches {{ "{:,.0f}".format(own) }} ulps:
that is the networks. The coloured lines are the optimizers alone: both are fed the
gradients that the Flax run recorded, and y, x and z are compared after every step. An
ulp here is 2<sup>-23</sup> &middot; max(1, max|w|) of the leaf; the limit is
{{ limit }}.</p>
<figure><img src="{{ distance }}"
  alt="Distance between Flax and PyTorch at every step, in ulps">
  <figcaption>Coloured lines below the red one: the optimizers agree.</figcaption>
</figure>

<h2 id="numbers">Numbers</h2>
<details><summary>Every epoch</summary>
<table>
<tr><th>epoch</th><th>loss, Flax</th><th>loss, PyTorch</th>
<th>accuracy, Flax</th><th>accuracy, PyTorch</th></tr>
{% for flax, torch in epochs %}
<tr><td>{{ loop.index }}</td>
<td>{{ "%.4f"|format(losses[0][loop.index0]) }}</td>
<td>{{ "%.4f"|format(losses[1][loop.index0]) }}</td>
<td>{{ "%.4f"|format(flax) }}</td><td>{{ "%.4f"|format(torch) }}</td></tr>
{% endfor %}
</table></details>
<details><summary>Settings and versions</summary>
<table class="text">
{% for name, value in s.optimizer.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
{% for name, value in s.versions.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></details>
</main>
</html>
"""
