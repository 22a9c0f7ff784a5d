"""Section 4.2.2: with BatchNorm and the recipe fewer steps reach the baseline, and pass it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims import Bench, Row, Study, first_step, main, mean, percent
from networks import classic_convnet
from pictures import WITH_BN, WITHOUT_BN, entitle, mark_chance, panel_row, save
from torch import manual_seed, nn
from training import Images, Run, train

import bnfx

RATES = (0.003, 0.01, 0.03, 0.1)
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
BATCH = 32
HELD_OUT = 5_000


@dataclass(frozen=True)
class Arm:
    """A row of the paper's table.

    Attributes:
        name: In print.
        activation: Of the network.
        lr_factor: Of the recipe; 1 with `insert` is BatchNorm alone, as in BN-Baseline.
        insert: Whether bnfx inserts BatchNorm.
        steps: Steps to 72.2 % in the paper, in millions; None where it never got there.
        best: Best accuracy in the paper, in percent.
    """

    name: str
    activation: type[nn.Module]
    lr_factor: float
    insert: bool
    steps: float | None
    best: str
    color: str
    style: str = "-"


ARMS = (
    Arm("baseline", nn.ReLU, 1, False, 31.0, "72.2 %", WITHOUT_BN),
    Arm("BN", nn.ReLU, 1, True, 13.3, "72.7 %", WITH_BN),
    Arm("BN x5", nn.ReLU, 5, True, 2.1, "73.0 %", "#009E73"),
    Arm("BN x30", nn.ReLU, 30, True, 2.7, "74.8 %", "#CC79A7"),
    Arm("sigmoid", nn.Sigmoid, 1, False, None, "chance", WITHOUT_BN, ":"),
    Arm("BN x5 sigmoid", nn.Sigmoid, 5, True, None, "69.8 %", "#009E73", ":"),
)


@dataclass(frozen=True)
class Setup:
    """A network and how it is trained."""

    model: nn.Module
    lr: float
    weight_decay: float
    decay: Callable[[float], float]


def decay(speed: float) -> Callable[[float], float]:
    """Exponential decay of the learning rate; at speed 1 it ends at a tenth."""
    return lambda share: math.exp(-speed * math.log(10) * share)


def prepare(bench: Bench, arm: Arm, lr: float, seed: int) -> Setup:
    """The network of an arm: as it is, with BatchNorm alone, or by the recipe."""
    manual_seed(seed)
    channels, side, _ = bench.shape
    width = 32 if bench.device.type == "cuda" else 8
    net = classic_convnet(channels, side, arm.activation, width).to(bench.device)
    if not arm.insert:
        return Setup(net, lr, WEIGHT_DECAY, decay(1))
    if arm.lr_factor == 1:
        return Setup(bnfx.insert_bn(net), lr, WEIGHT_DECAY, decay(1))
    made = bnfx.recipe(net, lr=lr, weight_decay=WEIGHT_DECAY, lr_factor=arm.lr_factor)
    now = made.hparams
    return Setup(made.model, now.lr, now.weight_decay, decay(now.decay_speedup))


def measure(bench: Bench) -> dict[str, Any]:
    """Every arm with every seed, at the rate that suits the baseline best."""
    steps = 150 if bench.quick else 20_000 if bench.device.type == "cuda" else 3_000
    rates = RATES[2:] if bench.quick else RATES
    bench.expect(steps * (len(rates) + len(ARMS) * len(bench.seeds)))
    lr, tuning = _tune(bench, rates, steps)
    arms: dict[str, Any] = {}
    at: list[int] = []
    for arm in ARMS:
        curves = []
        for seed in bench.seeds:
            setup = prepare(bench, arm, lr, seed)
            run = _train(bench, bench.data, setup, steps, seed, points=40)
            curves.append([round(a, 4) for a in run.accuracy])
            at = run.steps
        arms[arm.name] = {"lr": setup.lr, "weight_decay": setup.weight_decay, "accuracy": curves}
    return {"baseline_lr_tuning": tuning, "batch": BATCH, "steps": at, "arms": arms}


def _tune(bench: Bench, rates: tuple[float, ...], steps: int) -> tuple[float, dict[str, float]]:
    """The best rate of the baseline, on images that are held out of the training set."""
    held = min(HELD_OUT, len(bench.data.train_images) // 5)
    data = Images(
        bench.data.train_images[:-held],
        bench.data.train_labels[:-held],
        bench.data.train_images[-held:],
        bench.data.train_labels[-held:],
    )
    best = {}
    for rate in rates:
        setup = prepare(bench, ARMS[0], rate, seed=100)
        run = _train(bench, data, setup, steps, seed=100, points=10)
        best[f"{rate:g}"] = round(max(run.accuracy), 4)
    return max(rates, key=lambda rate: best[f"{rate:g}"]), best


def _train(bench: Bench, data: Images, setup: Setup, steps: int, seed: int, points: int) -> Run:
    return train(
        setup.model,
        data,
        lr=setup.lr,
        weight_decay=setup.weight_decay,
        decay=setup.decay,
        momentum=MOMENTUM,
        batch=BATCH,
        steps=steps,
        seed=seed,
        points=points,
        tick=bench.tick,
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over steps, mean over the seeds; all of it, and the upper end enlarged."""
    figure, axes = panel_row(2, share_y=False)
    for ax in axes:
        for arm in ARMS:
            curves = results["arms"][arm.name]["accuracy"]
            middle = [100 * mean(list(values)) for values in zip(*curves, strict=True)]
            (line,) = ax.plot(results["steps"], middle, label=arm.name, linewidth=1.5)
            line.set(color=arm.color, linestyle=arm.style)
        ax.set(xlabel="SGD step", xlim=(0, results["steps"][-1]))
    lr = results["arms"]["baseline"]["lr"]
    entitle(axes[0], f"Section 4.2.2 on {results['data']}", f"small convnet, baseline rate {lr:g}")
    entitle(axes[1], "The same, enlarged", f"mean of {len(results['seeds'])} seed(s)")
    mark_chance(axes[0], results["steps"][-1])
    axes[0].set(ylim=(0, 100), ylabel="Test accuracy (%)")
    target = 100 * max(mean(list(v)) for v in zip(*_curves(results, "baseline"), strict=True))
    axes[1].set(ylim=(target - 5, min(100, target + 1.5)))
    axes[0].legend(loc="center right", frameon=False, fontsize=8.5)
    save(figure, path)


def judge(results: dict[str, Any]) -> list[Row]:
    """A row for each arm: steps to the baseline's best accuracy, seed by seed, and the best."""
    baseline = _curves(results, "baseline")
    reached = mean([float(first_step(results["steps"], c, max(c)) or 0) for c in baseline])
    goal = mean([max(curve) for curve in baseline])
    rows = []
    for arm in ARMS:
        curves = _curves(results, arm.name)
        pairs = zip(curves, baseline, strict=True)
        firsts = [first_step(results["steps"], ours, max(target)) for ours, target in pairs]
        known = [float(step) for step in firsts if step is not None]
        best = mean([max(curve) for curve in curves])
        speed = reached / mean(known) if len(known) == len(firsts) else None
        theirs = f"{arm.steps}M steps" if arm.steps else "never"
        some = f"in {len(known)} of {len(firsts)} seeds" if known else "never"
        steps = f"{mean(known):,.0f} steps" if speed else some
        rows.append(
            Row(
                f"{arm.name}: steps to the baseline's best; best accuracy",
                f"{theirs}, {arm.best}",
                f"{steps}, {percent(best, 2)}",
                _verdict(arm, speed, best, goal),
            )
        )
    return [*rows, _near(results)]


def _near(results: dict[str, Any]) -> Row:
    """Steps to one point below the baseline's best accuracy, the mean over the seeds."""
    baseline = _curves(results, "baseline")
    steps = []
    for arm in ARMS:
        pairs = zip(_curves(results, arm.name), baseline, strict=True)
        firsts = [first_step(results["steps"], c, max(target) - 0.01) for c, target in pairs]
        known = [float(step) for step in firsts if step is not None]
        steps.append(
            f"{arm.name} {mean(known):,.0f}" if len(known) == len(firsts) else arm.name + " -"
        )
    return Row(
        "steps to one point below that (-: not in every seed)",
        "-",
        "; ".join(steps),
        "for comparison",
    )


def _verdict(arm: Arm, speed: float | None, best: float, goal: float) -> str:
    """Against the paper's ratio of steps, and against the baseline's accuracy."""
    if arm.name == "baseline":
        return "the reference"
    if arm.activation is nn.Sigmoid:
        learns = best > 0.5
        return "holds" if learns is arm.insert else "does not hold: it learns here"
    assert arm.steps is not None
    higher = "higher" if best > goal else "not higher"
    theirs = 31.0 / arm.steps
    if speed is None:
        return f"does not hold: not reached by every seed, {higher} at best"
    size = "holds" if speed >= theirs else "smaller" if speed > 1 else "does not hold"
    return f"{size}: {speed:.1f} times fewer steps (paper {theirs:.1f}), {higher} at best"


def _curves(results: dict[str, Any], arm: str) -> list[list[float]]:
    curves: list[list[float]] = results["arms"][arm]["accuracy"]
    return curves


STUDY = Study("inception_table", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
