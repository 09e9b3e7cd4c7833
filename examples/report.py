"""The tables and the plot of a run."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUALITY = {
    "model": "model",
    "params_m": "params (M)",
    "loss": "held-out loss",
    "perplexity": "perplexity",
    "gain": "gain over labels",
    "kl": "KL to teacher",
    "agreement": "agreement",
}

COST = {
    "model": "loss of",
    "ours_ms": "ms",
    "eager_ms": "PyTorch ms",
    "speedup": "speed-up",
    "ours_mib": "extra MiB",
    "inplace_mib": "in place MiB",
    "eager_mib": "PyTorch MiB",
}

TRACES = {
    "model": "labels only",
    "tokens": "tokens",
    "surprisal": "surprisal",
    "unlikely": "below 1%",
    "acceptance": "proposer's",
    "loss": "held-out loss",
    "gain": "gain over labels",
}

_FORMATS = {
    "params_m": "{:.2f}", "loss": "{:.3f}", "perplexity": "{:.1f}", "kl": "{:.3f}", "agreement": "{:.1%}", "ours_ms": "{:.1f}",
    "eager_ms": "{:.1f}", "speedup": "{:.1f}x", "ours_mib": "{:.1f}", "inplace_mib": "{:.1f}", "eager_mib": "{:.1f}",
    "tokens": "{:,}", "surprisal": "{:.3f}", "unlikely": "{:.1%}", "acceptance": "{:.1%}",
}  # fmt: skip

COLOURS = ("#6b7280", "#2563eb", "#ea580c", "#059669", "#7c3aed")

Row = Mapping[str, object]
"""Values by the keys of ``QUALITY``, ``TRACES`` and ``COST``, plus "gain_se", and "accuracy" and "passes" of the latents; a missing one prints as a dash."""


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if column == "gain":
        return f"{value:+.3f} ± {row['gain_se']:.3f}"
    return _FORMATS.get(column, "{}").format(value)


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Plain text, one line per model; `columns` maps keys to headings."""
    cells = [list(columns.values())] + [[_cell(row, column) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every number of the tables, unrounded."""
    columns = list(dict.fromkeys([*QUALITY, "gain_se", *TRACES, "accuracy", "passes", *COST]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: row.get(column) for column in columns} for row in rows)


Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Of each student (step, held-out loss)."""


def plot(rows: Sequence[Row], curves: Curves, surprisal: Mapping[str, Tensor], teacher_loss: float, path: Path) -> None:
    """Held-out loss of every student while it trains, what it thinks of traces, and the cost of every loss beside its eager form."""
    figure, axes = plt.subplots(1, 4, figsize=(20, 4.6), gridspec_kw={"width_ratios": [1.6, 1.2, 1, 1]}, layout="constrained")
    left, likely, middle, right = axes
    for (name, points), colour in zip(curves.items(), COLOURS):
        steps, losses = zip(*points)
        left.plot(steps, losses, color=colour, marker="o", markersize=3.5, label=f"{name}: {losses[-1]:.3f}")
    left.axhline(teacher_loss, color="black", linestyle="--", linewidth=1, label=f"teacher: {teacher_loss:.3f}")
    # the first point is ln V for every student and would flatten the rest
    late = [loss for points in curves.values() for _, loss in points[2:]] or [loss for points in curves.values() for _, loss in points]
    margin = 0.05 * (max(late) - teacher_loss) if math.isfinite(teacher_loss) else 0.1
    left.set_ylim(min(teacher_loss, min(late)) - margin, max(late) + margin)
    left.set(xlabel="step", ylabel="nats per token", title="Held-out loss of the students")
    left.legend(frameon=False)

    for (name, nats), colour in zip(surprisal.items(), COLOURS):
        ordered = nats.sort().values
        share = torch.arange(len(ordered), 0, -1) / len(ordered)
        likely.step((-ordered).exp(), share, color=colour, label=f"{name}: {nats.mean():.2f} nats")
    likely.axvline(0.01, color="black", linestyle="--", linewidth=1)
    likely.set(xscale="log", xlim=(1e-5, 1), ylim=(0, 1), xlabel="probability under the student", ylabel="share of tokens below", title="Traces")
    likely.legend(frameon=False, loc="upper left")

    students = [row for row in rows if row.get("ours_ms") is not None]
    _bars(middle, students, {"PyTorch": "eager_ms", "distilkernels": "ours_ms"}, "ms, forward + backward", "Time of the loss")
    memory = {"PyTorch": "eager_mib", "distilkernels": "ours_mib", "in place": "inplace_mib"}
    _bars(right, students, memory, "MiB beyond the logits, at the peak", "Extra memory of the loss")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes, rows: Sequence[Row], series: Mapping[str, str], unit: str, title: str) -> None:
    width = 0.8 / len(series)
    for i, (label, column) in enumerate(series.items()):
        positions = [j + (i - (len(series) - 1) / 2) * width for j in range(len(rows))]
        bars = axes.bar(positions, [row[column] for row in rows], width, label=label, color=("#d1d5db", "#2563eb", "#93c5fd")[i])
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(range(len(rows)), [str(row["model"]).replace(" ", "\n", 1) for row in rows])
    axes.set(ylabel=unit, title=title)
    axes.margins(y=0.35)
    axes.legend(frameon=False, loc="upper left")


def save(rows: Sequence[Row], curves: Curves, surprisal: Mapping[str, Tensor], teacher_loss: float, folder: Path) -> None:
    """results.csv and results.png in `folder`."""
    write_csv(rows, folder / "results.csv")
    plot(rows, curves, surprisal, teacher_loss, folder / "results.png")
