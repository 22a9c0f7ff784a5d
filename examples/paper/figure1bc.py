"""Figure 1b and c: with BatchNorm the inputs of the last hidden sigmoids stay more stable."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from claims import Bench, Row, Study, main, mean, two_arms
from pictures import WITH_BN, WITHOUT_BN, entitle, panel_row, save
from torch import Tensor, nn
from training import constant, predict, train

PERCENTILES = (0.15, 0.5, 0.85)
#: What is measured of a unit's inputs over training.
MEASURES = {
    "drift": "wandering of the median, in spreads",
    "settled": "the same after the first tenth of training",
    "growth": "growth of the spread, last over first",
}


def measure(bench: Bench) -> dict[str, Any]:
    """Percentiles of the inputs of the last hidden layer's sigmoids over the test images."""
    steps = 1_500 if bench.quick else 50_000
    bench.expect(2 * steps * len(bench.seeds))
    units: dict[str, dict[str, list[float]]] = {"without": {}, "with": {}}
    typical: dict[str, list[list[float]]] = {}
    at: list[int] = []
    for seed in bench.seeds:
        for arm, model in two_arms(bench, seed).items():
            seen: list[Tensor] = []
            watch = partial(_record, model, bench.data.test_images[:2000], seen)
            run = train(
                model,
                bench.data,
                lr=0.3 if bench.quick else 0.1,
                steps=steps,
                decay=constant,
                seed=seed,
                tick=bench.tick,
                watch=watch,
            )
            at = run.steps
            over_time = torch.stack(seen)  # (time, percentile, unit)
            moved = _changes(over_time)
            for name, values in moved.items():
                units[arm].setdefault(name, []).append(round(values.median().item(), 4))
            if seed == bench.seeds[0]:
                order = moved["drift"].argsort()
                unit = int(order[len(order) // 2])
                typical[arm] = [
                    [round(x, 4) for x in row] for row in over_time[:, :, unit].tolist()
                ]
    return {"steps": at, "typical": typical, "median_unit": units}


def _record(model: nn.Module, images: Tensor, seen: list[Tensor]) -> None:
    """Append (percentile, unit) of what the last sigmoid gets now."""
    last = [m for m in model.modules() if isinstance(m, nn.Sigmoid)][-1]
    inputs: list[Tensor] = []
    with last.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().cpu())):
        predict(model, images)
    seen.append(torch.quantile(torch.cat(inputs), torch.tensor(PERCENTILES), dim=0))


def _changes(over_time: Tensor) -> dict[str, Tensor]:
    """How much the inputs of each unit change over training; `MEASURES` by name.

    The start, before the first step, is left out. The spread is the distance of the 15th and the
    85th percentile. Wandering is the largest minus the smallest median over the mean spread: 0 is a
    distribution that stands still.
    """
    trained = over_time[1:]
    spread = trained[:, 2] - trained[:, 0]
    settled = trained[len(trained) // 10 :]
    return {
        "drift": _wandering(trained),
        "settled": _wandering(settled),
        "growth": spread[-1] / spread[0],
    }


def _wandering(over_time: Tensor) -> Tensor:
    middle = over_time[:, 1]
    return (middle.amax(0) - middle.amin(0)) / (over_time[:, 2] - over_time[:, 0]).mean(0)


def draw(results: dict[str, Any], path: Path) -> None:
    """The typical unit of either network: the one whose drift is the median of its layer."""
    figure, axes = panel_row(2, share_y=True)
    panels = (("without", "b", WITHOUT_BN), ("with", "c", WITH_BN))
    for ax, (arm, letter, color) in zip(axes, panels, strict=True):
        low, middle, high = zip(*results["typical"][arm], strict=True)
        ax.fill_between(results["steps"], low, high, color=color, alpha=0.15, linewidth=0)
        for values, style in ((low, ":"), (middle, "-"), (high, ":")):
            ax.plot(results["steps"], values, color=color, linestyle=style, linewidth=1.5)
        title = f"Figure 1{letter} on {results['data']}: {arm} BatchNorm"
        moved = mean(results["median_unit"][arm]["drift"])
        entitle(ax, title, f"15th, 50th, 85th percentile; the median wanders {moved:.2f} spreads")
        ax.set(xlabel="SGD step", xlim=(0, results["steps"][-1]))
    axes[0].set_ylabel("Input of a typical sigmoid, last hidden layer")
    save(figure, path)


def judge(results: dict[str, Any]) -> list[Row]:
    """Each measure of the median unit, with and without BatchNorm."""
    rows = []
    for name, title in MEASURES.items():
        plain, with_bn = (results["median_unit"][arm][name] for arm in ("without", "with"))
        rows.append(
            Row(
                f"{title}, without and with BN",
                "more stable with BN (no figure)",
                f"{mean(plain):.2f} and {mean(with_bn):.2f}",
                f"holds: {mean(plain) / mean(with_bn):.1f} times less with BN"
                if max(with_bn) < min(plain)
                else "does not hold in every seed",
            )
        )
    return rows


STUDY = Study("figure1bc", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
