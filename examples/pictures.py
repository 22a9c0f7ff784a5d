"""Pictures of the examples: panels in one style, and the training curves of the digits example."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from training import Run

WITH_BN = "#0072B2"  # blue and vermilion of the Okabe-Ito palette, told apart by everyone
WITHOUT_BN = "#D55E00"
CHANCE = 10.0


def draw_curves(panels: Sequence[tuple[str, str, Run, Run]], path: Path) -> None:
    """One panel for each (title, subtitle, run without BN, run with BN), written to `path`."""
    figure, axes = panel_row(len(panels), dpi=200)
    for ax, (title, subtitle, plain, with_bn) in zip(axes, panels, strict=True):
        _draw_panel(ax, title, subtitle, plain, with_bn)
    axes[0].set_ylabel("Test accuracy (%)")
    figure.savefig(path)


def panel_row(
    count: int, *, dpi: int = 110, width: float = 4.8, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels side by side."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.05)
    figure = Figure(figsize=(width * count, 3.9), dpi=dpi, layout=layout)
    return figure, list(figure.subplots(1, count, sharey=share_y, squeeze=False)[0])


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette of 64 colours, a third of the size of one without."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def entitle(ax: Axes, title: str, subtitle: str) -> None:
    """Title and subtitle flush left; light lines behind the curves, no box around them."""
    ax.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=20)
    ax.text(0, 1.03, subtitle, transform=ax.transAxes, color="0.35", fontsize=9)
    ax.grid(axis="y", color="0.92", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def mark_chance(ax: Axes, x: float, *, left: bool = False) -> None:
    """A dashed line at the accuracy of guessing, named above it up to `x`, or below it from `x`."""
    ax.axhline(CHANCE, color="0.55", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    y, side = (CHANCE - 5.5, "left") if left else (CHANCE + 1.5, "right")
    ax.text(x, y, "chance", color="0.45", ha=side, fontsize=9)


def _draw_panel(ax: Axes, title: str, subtitle: str, plain: Run, with_bn: Run) -> None:
    for run, color, name in ((with_bn, WITH_BN, "with"), (plain, WITHOUT_BN, "without")):
        percent = [100 * value for value in run.accuracy]
        label = f"{name} BatchNorm: {percent[-1]:.1f} %"
        ax.plot(run.steps, percent, color=color, linewidth=2, label=label, clip_on=False)
    mark_chance(ax, with_bn.steps[-1])
    entitle(ax, title, subtitle)
    ax.set(xlabel="SGD step", xlim=(0, with_bn.steps[-1]), ylim=(0, 100))
    ax.set_yticks(range(0, 101, 20))
    ax.legend(loc="center right", frameon=False, fontsize=9.5)


CALIBRATED = "#009E73"  # bluish green of the same palette


def draw_retrofit(outcomes: Sequence[tuple[str, int, Run]], path: Path) -> None:
    """One panel for each learning rate; thin lines are seeds, thick ones their means."""
    colors = dict(zip(dict.fromkeys(form for form, _, _ in outcomes), COLORS, strict=True))
    factors = [*dict.fromkeys(factor for _, factor, _ in outcomes)]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.05)
    figure = Figure(figsize=(3.9 * len(factors), 3.9), dpi=120, layout=layout)
    axes = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
    for ax, factor in zip(axes, factors, strict=True):
        for form, color in colors.items():
            runs = [run for f, k, run in outcomes if (f, k) == (form, factor)]
            curves = [[100 * value for value in run.accuracy] for run in runs]
            for curve in curves:
                ax.plot(runs[0].steps, curve, color=color, linewidth=0.8, alpha=0.35)
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            ax.plot(runs[0].steps, means, color=color, linewidth=2, label=form)
        ax.set_title(f"learning rate x {factor}", loc="left", fontweight="bold", fontsize=11)
        ax.set(xlabel="SGD step after the retrofit", ylim=(0, 100))
        ax.grid(axis="y", color="0.92", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Test accuracy (%)")
    axes[0].legend(loc="lower right", frameon=False, fontsize=9.5)
    save(figure, path)


COLORS = (WITHOUT_BN, WITH_BN, CALIBRATED)
