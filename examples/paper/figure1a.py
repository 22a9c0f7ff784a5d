"""Figure 1a: with BatchNorm the perceptron of section 4.1 trains faster and ends higher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from claims import Bench, Row, Study, first_step, main, mean, percent, two_arms
from pictures import WITH_BN, WITHOUT_BN, entitle, mark_chance, panel_row, save
from training import constant, train

LR = 0.1


def measure(bench: Bench) -> dict[str, Any]:
    """Test accuracy along the way, for every seed with and without BatchNorm."""
    steps = 1_500 if bench.quick else 50_000
    lr = 3 * LR if bench.quick else LR
    bench.expect(2 * steps * len(bench.seeds))
    curves: dict[str, list[list[float]]] = {"without": [], "with": []}
    at: list[int] = []
    for seed in bench.seeds:
        for arm, model in two_arms(bench, seed).items():
            run = train(
                model, bench.data, lr=lr, steps=steps, decay=constant, seed=seed, tick=bench.tick
            )
            curves[arm].append([round(a, 4) for a in run.accuracy])
            at = run.steps
    return {"lr": lr, "init_std": 0.1, "batch": 60, "steps": at, "accuracy": curves}


def draw(results: dict[str, Any], path: Path) -> None:
    """All seeds, from the first step on and the upper end enlarged."""
    figure, axes = panel_row(2, share_y=False)
    for ax in axes:
        for arm, color in (("with", WITH_BN), ("without", WITHOUT_BN)):
            for i, curve in enumerate(results["accuracy"][arm]):
                label = f"{arm} BatchNorm" if i == 0 else None
                values = [100 * a for a in curve]
                ax.plot(results["steps"], values, color=color, linewidth=1.3, label=label)
        ax.set(xlabel="SGD step", xlim=(0, results["steps"][-1]))
    title = f"Figure 1a on {results['data']}"
    entitle(axes[0], title, "three hidden layers of 100 sigmoids, batch 60")
    entitle(axes[1], "The same, enlarged", f"plain SGD, learning rate {results['lr']} throughout")
    mark_chance(axes[0], results["steps"][-1])
    top = 100 * max(max(curve) for curve in results["accuracy"]["with"])
    axes[0].set(ylim=(0, 100), ylabel="Test accuracy (%)")
    axes[1].set(ylim=(top - 10, top + 0.5))
    axes[0].legend(loc="center right", frameon=False, fontsize=9.5)
    save(figure, path)


def judge(results: dict[str, Any]) -> list[Row]:
    """Final accuracy, and how much sooner BatchNorm reaches what the plain network ends with."""
    steps = results["steps"]
    plain, with_bn = (results["accuracy"][arm] for arm in ("without", "with"))
    ends = {arm: [c[-1] for c in curves] for arm, curves in results["accuracy"].items()}
    reached = [
        first_step(steps, ours, theirs[-1]) for ours, theirs in zip(with_bn, plain, strict=True)
    ]
    speed = [steps[-1] / step if step else 0.0 for step in reached]
    return [
        Row(
            "accuracy at the end, without and with BN",
            "higher with BN (no figure)",
            f"{percent(mean(ends['without']))} and {percent(mean(ends['with']))}",
            "holds" if min(ends["with"]) > max(ends["without"]) else "does not hold in every seed",
        ),
        Row(
            "steps until the plain net's final accuracy",
            "fewer with BN (no figure)",
            f"{min(speed):.1f} to {max(speed):.1f} times fewer",
            "holds" if min(speed) > 1 else "does not hold in every seed",
        ),
    ]


STUDY = Study("figure1a", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
