"""BatchNorm for a network that is trained already: keep its accuracy, then train on, faster.

A convolutional network learns scikit-learn's digits without BatchNorm. Then it is trained on with
the rate it was trained with, or many times that, in three forms: as it is; with BatchNorm inserted
naively (`init="fresh"`); and with BatchNorm calibrated on some hundred training images
(`init="calibrate"`), which leaves its outputs where they were. Three seeds; retrofit.json holds all
numbers, retrofit.png shows the accuracies. The test images are never used for calibration.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import ConvNet
from pictures import draw_retrofit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from training import BATCH, Images, Run, load, predict, share, train

import bnfx

RATE = 0.03
FACTORS = (1, 3, 10)
SEEDS = (0, 1, 2)
CALIBRATION_IMAGES = 600


@dataclass(frozen=True)
class Outcome:
    """One form of the network, one seed, one learning rate.

    Attributes:
        form: "without BatchNorm", "inserted naively" or "calibrated".
        seed: Of the split and of the initial weights.
        factor: Learning rate over that of the training before.
        run: Accuracy over the steps, the first before any.
    """

    form: str
    seed: int
    factor: int
    run: Run

    def to_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return {
            "form": self.form,
            "seed": self.seed,
            "factor": self.factor,
            "step": self.run.steps,
            "test_accuracy": self.run.accuracy,
        }


def calibrated(model: nn.Module, data: Images) -> nn.Module:
    """The network with BatchNorms that have seen training images; it computes what it did."""
    batches = data.train_images[:CALIBRATION_IMAGES].split(BATCH)
    return bnfx.insert_bn(model, init="calibrate", calibration_data=batches)


FORMS: dict[str, Callable[[nn.Module, Images], nn.Module]] = {
    "without BatchNorm": lambda model, _: copy.deepcopy(model),
    "inserted naively": lambda model, _: bnfx.insert_bn(model),
    "calibrated": calibrated,
}


def compare(seed: int, *, before: int, after: int, tick: Callable[[], object]) -> list[Outcome]:
    """Train without BatchNorm for `before` steps, then each form for `after` steps."""
    data = load(seed)
    torch.manual_seed(seed)
    trained = ConvNet()
    train(trained, data, lr=RATE, steps=before, tick=tick)
    outcomes = []
    for factor in FACTORS:
        for form, made in FORMS.items():
            run = train(made(trained, data), data, lr=RATE * factor, steps=after, tick=tick)
            outcomes.append(Outcome(form, seed, factor, run))
    truth = share(predict(trained, data.test_images), data.test_labels)
    for outcome in outcomes:
        if outcome.form == "calibrated" and outcome.run.accuracy[0] != truth:
            raise AssertionError(f"calibration moved the accuracy from {truth}")
    return outcomes


def table(outcomes: list[Outcome]) -> Table:
    """Mean test accuracy over the seeds, and the worst seed, in percent."""
    drawn = Table(title="Test accuracy (%), mean over seeds (worst seed)", title_justify="left")
    for column in ("learning rate", "", "at once", "lowest on the way", "at the end"):
        drawn.add_column(column, justify="left" if not column else "right")
    for factor in FACTORS:
        for form in FORMS:
            runs = [o.run for o in outcomes if (o.factor, o.form) == (factor, form)]
            moments = ([r.accuracy[0] for r in runs], [min(r.accuracy) for r in runs])
            ends = [r.accuracy[-1] for r in runs]
            cells = [_mean_and_worst(values) for values in (*moments, ends)]
            drawn.add_row(f"x {factor}", form, *cells)
    return drawn


def _mean_and_worst(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f})"


def main(argv: list[str]) -> int:
    """Run all seeds, print the table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # faster for networks this small
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, before, after = (SEEDS[:1], 60, 10) if options.quick else (SEEDS, 3000, 300)
    console = Console()
    outcomes: list[Outcome] = []
    with Progress(console=console) as progress:
        total = len(seeds) * (before + len(FACTORS) * len(FORMS) * after)
        tick = partial(progress.advance, progress.add_task("training", total=total))
        for seed in seeds:
            outcomes += compare(seed, before=before, after=after, tick=tick)
    console.print(table(outcomes))
    report = {"rate": RATE, "steps": [before, after], "outcomes": [o.to_dict() for o in outcomes]}
    (options.out / "retrofit.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_retrofit([(o.form, o.factor, o.run) for o in outcomes], options.out / "retrofit.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
