"""Pictures of the benchmarks of folding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: Of the Okabe-Ito palette, told apart by everyone.
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "0.45")


def draw_left(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Shares of BatchNorms left, for the networks where bnfx or the exporter leave any."""
    arms = ("left: bnfx", "left: bnfx thresholds", "left: exporter")
    shown = [row for row in rows if row.get("BN") and any(row.get(arm) for arm in arms)]
    figure = Figure(figsize=(7, 1.2 + 0.3 * max(len(shown), 1)), dpi=110, layout="constrained")
    ax = figure.subplots()
    for i, arm in enumerate(arms):
        y = [k + 0.26 * (1 - i) for k in range(len(shown))]
        share = [100 * (row.get(arm) or 0) / row["BN"] for row in shown]
        color = COLORS[(0, 1, 3)[i]]
        ax.barh(y, share, height=0.24, color=color, label=arm.partition(": ")[2])
    ax.set_yticks(range(len(shown)), [str(row["network"]).partition(":")[2] for row in shown])
    ax.set_xlabel("BatchNorms left (%)")
    _finish(ax, "Where anything is left")
    figure.savefig(path)


def draw_ratios(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: Path) -> None:
    """A point for each network and each of `keys`: a ratio, with a line at 1."""
    figure = Figure(figsize=(7, 1.2 + 0.34 * max(len(rows), 1)), dpi=110, layout="constrained")
    ax = figure.subplots()
    for i, key in enumerate(keys):
        known = [(row[key], k) for k, row in enumerate(rows) if row.get(key) is not None]
        ax.plot(*zip(*known, strict=True), "o", color=COLORS[i], label=key) if known else None
    ax.axvline(1, color="0.5", linewidth=0.9)
    ax.set_yticks(range(len(rows)), [str(row["network"]).partition(":")[2] for row in rows])
    ax.set_xlabel("latency, folded over baseline (less is better)")
    _finish(ax, "Latency on one thread")
    figure.savefig(path)


def draw_line(x: Sequence[float], y: Mapping[str, Sequence[float]], path: Path) -> None:
    """Seconds over graph size."""
    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    ax = figure.subplots()
    for i, (label, values) in enumerate(y.items()):
        ax.plot(x, values, "o-", color=COLORS[i], label=label)
    ax.set(xlabel="nodes of the inference graph", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    _finish(ax, "Time over size")
    figure.savefig(path)


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    ax.grid(axis="x", color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
