"""A network slimmed by its gammas: trained with an L1 penalty on them, folded without the rest.

The penalty is a proximal step: after each update every gamma comes nearer to zero by a fixed amount
and stays there once it is (Liu et al., "Learning Efficient Convolutional Networks through Network
Slimming", ICCV 2017, train by subgradient and cut by a threshold). A channel whose gamma is zero is
a constant, and `drop_dead=True` takes it out of all layers exactly: the accuracy is the same image
by image. Operations, weights and latency are counted before and after. slim.json holds the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from image_data import load_images
from networks import SlimNet
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import Images, falling, predict, share, train

import bnfx

RATE = 0.05


def shrink(model: nn.Module, amount: float) -> None:
    """The proximal step of an L1 penalty on the gammas: soft thresholding."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(module.weight.sign() * (module.weight.abs() - amount).relu())


def slimmed(data: Images, *, steps: int, amount: float, progress: Progress) -> nn.Module:
    """A trained network, many of its gammas zero."""
    torch.manual_seed(0)
    model = SlimNet()
    task = progress.add_task("training", total=steps)

    done = itertools.count()

    def tick() -> None:
        shrink(model, amount * falling(next(done) / steps))  # as the learning rate falls
        progress.advance(task)

    train(model, data, lr=RATE, steps=steps, tick=tick, momentum=0.9, batch=32, points=1)
    return model.eval()


def counts(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Weights, and multiplications for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"weights": weights, "multiplications": counter.get_total_flops() // 2}


def compared(model: nn.Module, data: Images, out: Path) -> dict[str, Any]:
    """The folded network with all channels, and without those that are dead."""
    image = data.test_images[:1]
    folded, slim = bnfx.fold_bn(model, image), bnfx.fold_bn(model, image, drop_dead=True)
    done = bnfx.report(slim)
    assert isinstance(done, bnfx.FoldReport)
    files = [out / "folded.onnx", out / "slim.onnx"]
    bnfx.deploy(model, image, files[0])
    deployed = bnfx.deploy(model, image, files[1], fold_options={"drop_dead": True})
    measured = bnfx.benchmark_onnx(files[1], image, baseline=files[0], num_runs=100)
    labels = [predict(each, data.test_images) for each in (model, folded, slim)]
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    return {
        "gammas": len(gammas),
        "gammas_that_are_zero": int((gammas == 0).sum()),
        "test_accuracy": [share(each, data.test_labels) for each in labels],
        "test_images_read_differently": int((labels[0] != labels[2]).sum()),
        "folded": counts(folded, image),
        "slim": counts(slim, image),
        "latency_ratio": measured.ratio,
        "verify": deployed.verify.status,
        "dropped": [drop.__dict__ for drop in done.dropped],
    }


def table(found: dict[str, Any]) -> Table:
    """What it cost before and after."""
    drawn = Table(title="One image", title_justify="left")
    for column in ("", "folded", "slim", "ratio"):
        drawn.add_column(column, justify="right" if column else "left")
    for name in ("weights", "multiplications"):
        before, after = found["folded"][name], found["slim"][name]
        drawn.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    _, before, after = found["test_accuracy"]
    drawn.add_row("test accuracy (%)", f"{100 * before:.2f}", f"{100 * after:.2f}", "")
    drawn.add_row("latency in onnxruntime", "", "", f"{found['latency_ratio']:.3f}")
    return drawn


def main(argv: Sequence[str]) -> int:
    """Train, fold, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--cache", type=Path, default=Path("data"), help="folder for the images")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument(
        "--amount", type=float, default=0.007, help="that gammas lose in the first step"
    )
    parser.add_argument("--quick", action="store_true", help="digits, few steps")
    asked = parser.parse_args(argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console()
    data = load_images("digits" if asked.quick else asked.data, asked.cache)
    with Progress(console=console) as progress:
        steps = 150 if asked.quick else asked.steps
        amount = 0.02 if asked.quick else asked.amount
        model = slimmed(data, steps=steps, amount=amount, progress=progress)
    found = compared(model, data, asked.out)
    (asked.out / "slim.json").write_text(json.dumps(found, indent=1) + "\n")
    zeros, gammas = found["gammas_that_are_zero"], found["gammas"]
    console.print(f"{zeros} of {gammas} gammas are zero; the file without them: {found['verify']}")
    console.print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
