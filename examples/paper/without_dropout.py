"""Section 3.4: BatchNorm regularises, so that Dropout can be removed."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from claims import Bench, Row, Study, main, mean, percent
from pictures import WITH_BN, WITHOUT_BN, entitle, panel_row, save
from torch import manual_seed, nn
from training import Images, predict, share, train

import bnfx
from bnfx.passes import RemoveDropout

#: Few images, so that regularisation has something to do.
TRAIN_IMAGES = 5_000
ARMS = ("plain", "dropout", "BN + dropout", "BN")


def build(pixels: int, width: int) -> nn.Module:
    """Two hidden layers of rectifiers, each followed by Dropout at 0.5."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, inputs in ((1, pixels), (2, width)):
        layers[f"fc{i}"] = nn.Linear(inputs, width)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"dropout{i}"] = nn.Dropout(0.5)
    return nn.Sequential(OrderedDict(layers, head=nn.Linear(width, 10)))


def arms(net: nn.Module) -> dict[str, nn.Module]:
    """With and without Dropout, with and without BatchNorm, from the same initial weights."""
    without = bnfx.apply_pass(RemoveDropout(), net).model
    models = (without, net, bnfx.insert_bn(net), bnfx.insert_bn(without))
    return dict(zip(ARMS, models, strict=True))


def measure(bench: Bench) -> dict[str, Any]:
    """Accuracy on the training and on the test images at the end, for every arm and seed."""
    steps, width = (300, 64) if bench.quick else (6_000, 300)
    bench.expect(len(ARMS) * steps * len(bench.seeds))
    few = Images(
        bench.data.train_images[:TRAIN_IMAGES],
        bench.data.train_labels[:TRAIN_IMAGES],
        bench.data.test_images,
        bench.data.test_labels,
    )
    ends: dict[str, dict[str, list[float]]] = {arm: {"train": [], "test": []} for arm in ARMS}
    for seed in bench.seeds:
        manual_seed(seed)
        for arm, model in arms(build(bench.pixels, width).to(bench.device)).items():
            run = train(model, few, lr=0.1, steps=steps, seed=seed, tick=bench.tick, points=1)
            on_train = share(predict(model, few.train_images), few.train_labels)
            ends[arm]["train"].append(round(on_train, 4))
            ends[arm]["test"].append(round(run.accuracy[-1], 4))
    return {"train_images": len(few.train_images), "lr": 0.1, "steps": steps, "accuracy": ends}


def draw(results: dict[str, Any], path: Path) -> None:
    """A dot for each seed, a bar for the mean."""
    figure, (ax,) = panel_row(1, width=6.4)
    for i, arm in enumerate(ARMS):
        dots = [100 * a for a in results["accuracy"][arm]["test"]]
        color = WITH_BN if "BN" in arm else WITHOUT_BN
        ax.hlines(mean(dots), i - 0.25, i + 0.25, color=color, linewidth=2.5)
        ax.plot([i] * len(dots), dots, "o", color=color, markersize=5, alpha=0.7)
        ax.annotate(f"{mean(dots):.2f}", (i + 0.28, mean(dots)), va="center", fontsize=9)
    ax.set_xticks(range(len(ARMS)), ARMS)
    ax.set(ylabel="Test accuracy (%)", xlim=(-0.5, len(ARMS) - 0.3))
    subtitle = f"{results['train_images']:,} training images, {results['steps']:,} SGD steps"
    entitle(ax, f"Dropout and BatchNorm, {results['data']}", subtitle)
    save(figure, path)


def judge(results: dict[str, Any]) -> list[Row]:
    """BatchNorm without Dropout against Dropout without BatchNorm, and against both."""
    test = {arm: results["accuracy"][arm]["test"] for arm in ARMS}
    ends = {arm: mean(values) for arm, values in test.items()}
    noise = max(max(values) - min(values) for values in test.values())

    def verdict(gain: float) -> str:
        if abs(gain) <= noise:
            return f"holds: equal within the spread of the seeds ({100 * noise:.2f} points)"
        return "holds" if gain > 0 else f"smaller: {-100 * gain:.2f} points are lost"

    return [
        Row(
            "BN without Dropout, against Dropout without BN",
            "Dropout can go, no loss (no figure)",
            f"{percent(ends['BN'], 2)} against {percent(ends['dropout'], 2)}",
            verdict(ends["BN"] - ends["dropout"]),
        ),
        Row(
            "BN without Dropout, against BN with Dropout",
            "no increase of overfitting (no figure)",
            f"{percent(ends['BN'], 2)} against {percent(ends['BN + dropout'], 2)}",
            verdict(ends["BN"] - ends["BN + dropout"]),
        ),
        Row(
            "neither, for comparison",
            "-",
            percent(ends["plain"], 2),
            f"BN alone adds {100 * (ends['BN'] - ends['plain']):+.2f} points",
        ),
    ]


STUDY = Study("without_dropout", (__doc__ or "").strip(), measure, draw, judge)

if __name__ == "__main__":
    sys.exit(main(STUDY, sys.argv[1:]))
