"""Draw the picture of the first page from the demo's report, and the figure of the gauges.

make demo && .venv/bin/python examples/site/overview.py demo/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

IMAGES = Path(__file__).parent / "docs" / "img"
BLUE, ORANGE, GREEN, INK, SOFT = "#0072B2", "#D55E00", "#009E73", "#1b1f24", "0.42"


def boxes(ax: Axes, names: list[tuple[str, str]], y: float, *, width: float = 0.22) -> None:
    """A chain of boxes from left to right, with arrows between."""
    step = 1 / len(names)
    for i, (name, color) in enumerate(names):
        x = step * (i + 0.5)
        shape = "round,pad=0,rounding_size=0.02"
        place = (x - width / 2, y - 0.055)
        box = FancyBboxPatch(place, width, 0.11, boxstyle=shape, fc="white", ec=color, lw=1.6)
        ax.add_patch(box)
        ax.text(x, y, name, ha="center", va="center", fontsize=8.5, color=color)
        if i:
            tip, tail = x - width / 2 - 0.005, x - step + width / 2 + 0.005
            ax.annotate("", (tip, y), (tail, y), arrowprops={"arrowstyle": "->", "color": SOFT})


def overview(report: dict[str, Any]) -> Figure:
    """Before, trained, folded, verified: the graph above, what was measured below."""
    net = report["networks"]["mlp"]
    figure = Figure(figsize=(11, 3.7), dpi=160)
    titles = (
        "1  before",
        "2  BatchNorm inserted, trained",
        "3  folded",
        "4  exported and verified",
    )
    chains = (
        [("fc1", INK), ("sigmoid", INK), ("fc2", INK)],
        [("fc1", INK), ("BN", ORANGE), ("sigmoid", INK)],
        [("fc1'", BLUE), ("sigmoid", INK), ("fc2'", BLUE)],
        [("torch", INK), ("=", GREEN), (".onnx", BLUE)],
    )
    for i, (title, chain) in enumerate(zip(titles, chains, strict=True)):
        top = figure.add_axes((0.02 + 0.245 * i, 0.68, 0.225, 0.3))
        top.axis("off")
        top.set(xlim=(0, 1), ylim=(0, 0.4))
        top.text(0.02, 0.36, title, fontweight="bold", fontsize=10, va="top", color=INK)
        boxes(top, chain, 0.13, width=0.26)
    drawn = [figure.add_axes((0.055 + 0.245 * i, 0.17, 0.18, 0.44)) for i in range(4)]
    for ax in drawn:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    for ax, key, color in ((drawn[0], "without_bn", INK), (drawn[1], "with_bn", ORANGE)):
        curve = net["curves"][key]
        percent = [100 * value for value in curve["test_accuracy"]]
        ax.plot(curve["step"], percent, color=color, lw=1.8)
        ax.set(ylim=(0, 100), xlim=(0, curve["step"][-1]))
        ax.set_xlabel("SGD steps", fontsize=8.5)
        ax.set_title(f"test accuracy {percent[-1]:.1f} %", fontsize=9, color=color)
    arms = {arm["arm"]: 1e6 * arm["median"] for arm in net["latency"]["arms"]}
    times = [arms["baseline"], arms["file"]]
    bars = drawn[2].barh(["with BN", "folded"], times, color=[ORANGE, BLUE], height=0.5)
    drawn[2].bar_label(bars, [f" {t:.0f} µs" for t in times], fontsize=8.5)
    drawn[2].set(xlim=(0, 1.35 * max(times)))
    drawn[2].invert_yaxis()
    drawn[2].set_xlabel("a forward in onnxruntime", fontsize=8.5)
    gone = len(net["fold"]["batch_norms"])
    drawn[2].set_title(f"{gone} of {gone} BatchNorms gone", fontsize=9, color=BLUE)
    layers = net["verify"]["layers"]
    drawn[3].plot([layer["ratio"] for layer in layers], "o", color=GREEN, ms=5)
    drawn[3].axhline(4, color=SOFT, lw=1, ls=(0, (4, 3)))
    drawn[3].text(len(layers) - 1, 4.15, "limit", fontsize=8, ha="right", color=SOFT)
    drawn[3].set(ylim=(0, 5), xticks=range(len(layers)))
    drawn[3].set_xticklabels([layer["name"] for layer in layers], rotation=45, fontsize=7.5)
    drawn[3].set_title("error / error of float32", fontsize=9, color=GREEN)
    return figure


def gauges() -> Figure:
    """Two layers as they were trained, and in a gauge where the BatchNorm is the identity."""
    figure = Figure(figsize=(8.4, 2.3), dpi=160)
    rows = (
        (
            "trained",
            [("conv", INK), ("x", SOFT), ("BN: s x + t", ORANGE), ("y", SOFT), ("conv", INK)],
        ),
        (
            "solved",
            [("conv'", BLUE), ("a(x+d)", GREEN), ("identity", GREEN), ("y", SOFT), ("conv", INK)],
        ),
    )
    for i, (name, chain) in enumerate(rows):
        ax = figure.add_axes((0.1, 0.58 - 0.46 * i, 0.88, 0.4))
        ax.axis("off")
        ax.set(xlim=(0, 1), ylim=(0, 0.4))
        ax.text(-0.01, 0.24, name, ha="right", va="center", fontsize=10, color=INK)
        boxes(ax, chain, 0.24, width=0.16)
        if i:
            told = "a = s,  d = t / s:  W' = s W,  b' = s b + t"
            ax.text(0.3, 0.06, told, ha="center", fontsize=9, color=GREEN)
    return figure


def main(argv: list[str]) -> int:
    """Write both pictures."""
    report = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    IMAGES.mkdir(exist_ok=True)
    overview(report).savefig(IMAGES / "overview.png")
    gauges().savefig(IMAGES / "gauges.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
