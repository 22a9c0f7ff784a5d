"""One hyper-parameter over a range, with and without BatchNorm: what several scripts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from claims import Bench, mean
from pictures import WITH_BN, WITHOUT_BN, entitle, mark_chance, panel_row, save
from torch import nn
from training import constant, train


def trained(results: dict[str, Any]) -> float:
    """The share of test images from which a network counts as trained: these are small ones."""
    return 0.9 if results["data"] in ("MNIST", "8x8 digits") else 0.8


def sweep(
    bench: Bench,
    values: Sequence[float],
    steps: int,
    arms: Callable[[float, int], dict[str, nn.Module]],
    lr: Callable[[float], float],
) -> dict[str, Any]:
    """Final test accuracy of both arms, for every value and seed.

    Args:
        bench: Where to measure.
        values: Of the hyper-parameter.
        steps: SGD steps of each network.
        arms: (value, seed) -> the networks by arm.
        lr: value -> learning rate.
    """
    bench.expect(2 * steps * len(values) * len(bench.seeds))
    ends: dict[str, list[list[float]]] = {"without": [], "with": []}
    for value in values:
        at: dict[str, list[float]] = {"without": [], "with": []}
        for seed in bench.seeds:
            for arm, model in arms(value, seed).items():
                run = train(
                    model,
                    bench.data,
                    lr=lr(value),
                    steps=steps,
                    decay=constant,
                    seed=seed,
                    tick=bench.tick,
                    points=1,
                )
                at[arm].append(round(run.accuracy[-1], 4))
        for arm, accuracies in at.items():
            ends[arm].append(accuracies)
    return {"values": list(values), "steps": steps, "accuracy": ends}


def draw_sweep(
    results: dict[str, Any], path: Path, *, title: str, subtitle: str, xlabel: str, log: bool
) -> None:
    """Mean over the seeds as a line, each seed as a dot."""
    figure, (ax,) = panel_row(1, width=6.4)
    for arm, color in (("with", WITH_BN), ("without", WITHOUT_BN)):
        ends = results["accuracy"][arm]
        middle = [100 * mean(seeds) for seeds in ends]
        ax.plot(results["values"], middle, color=color, linewidth=2, label=f"{arm} BatchNorm")
        for value, seeds in zip(results["values"], ends, strict=True):
            dots = [100 * a for a in seeds]
            ax.plot([value] * len(dots), dots, "o", color=color, markersize=4, clip_on=False)
    if log:
        ax.set_xscale("log")
    mark_chance(ax, results["values"][0], left=True)
    entitle(ax, f"{title}, {results['data']}", subtitle)
    ax.set(
        xlabel=xlabel, ylabel=f"Test accuracy after {results['steps']:,} steps (%)", ylim=(0, 100)
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    save(figure, path)


def trained_values(results: dict[str, Any], arm: str) -> list[float]:
    """The values at which every seed of the arm counts as trained."""
    pairs = zip(results["values"], results["accuracy"][arm], strict=True)
    return [value for value, seeds in pairs if min(seeds) >= trained(results)]


def span(values: Sequence[float]) -> str:
    """[0.1, 1, 10] -> "0.1 to 10"; what lies between is not looked at."""
    if not values:
        return "none"
    return f"{min(values):g} to {max(values):g}" if len(values) > 1 else f"{values[0]:g} only"
