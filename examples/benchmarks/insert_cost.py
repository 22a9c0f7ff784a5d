"""What insertion costs: memory at its peak in units of the weights, and forwards of the model.

    python examples/benchmarks/insert_cost.py                 # VGG-16, ResNet-50, ViT-B, 224 pixels
    python examples/benchmarks/insert_cost.py --quick --out /tmp/results     # ResNet-18, 64 pixels

Each row is a process of its own, in which a small network was taken first: what is imported then
is no cost of the model. BatchNorms that a network has are taken out before. The peak holds the
source itself. Forwards are counted; those on calibration data stand apart. Time is processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fold_networks import build
from measuring import (
    in_child,
    peak_bytes,
    progress_bar,
    reset_peak,
    resident_bytes,
    save,
    show,
    start,
)
from rich.console import Console
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bnfx
from bnfx.cli.libraries import open_torchvision
from bnfx.reports.report import InsertReport

NETWORKS = ("vgg16", "resnet50", "vit_b_16")
INITS = ("fresh", "identity", "calibrate")

_BATCHES = 2


class _Forwards(TorchFunctionMode):
    """Counts the convolutions of images, which each of the networks has one of."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; proxies in the place of an image do not count."""
        image = args[0] if args else None
        if func is torch.conv2d and type(image) is Tensor:
            self.count += image.shape[1] == 3
        return func(*args, **(kwargs or {}))


def measured(name: str, init: str, pixels: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"init": init}  # a plain word here
    x = torch.randn(2, 3, pixels, pixels)
    data = [torch.randn_like(x) for _ in range(_BATCHES)] if init == "calibrate" else []
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    small(x)

    def insert(model: nn.Module) -> nn.Module:
        return bnfx.insert_bn(model, x, calibration_data=data or None, **options)

    insert(small)
    del small
    open_torchvision()
    before = resident_bytes()
    model = build(f"torchvision:{name}").eval()
    for path, module in [*model.named_modules()]:
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.Identity())
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with torch.no_grad():
        model(x)
        begun = time.process_time()
        model(x)
    forward = time.process_time() - begun
    reset_peak()
    begun = time.process_time()
    with _Forwards() as forwards:
        inserted = insert(model)
    seconds, peak = time.process_time() - begun, peak_bytes() - before
    done = bnfx.report(inserted)
    assert isinstance(done, InsertReport)
    return {
        "network": name,
        "init": init,
        "weights, MB": weights / 1e6,
        "inserted": sum(site.action == "inserted" for site in done.sites),
        "peak, weights": peak / weights,
        "forwards": forwards.count - len(data),
        "on calibration data": len(data),
        "forward, s": forward,
        "insert_bn, s": seconds,
        "insert_bn, forwards": seconds / forward,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for insert_cost.csv and .json")
    parser.add_argument("--quick", action="store_true", help="ResNet-18, 64 pixels")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="of torchvision")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        print(json.dumps(measured(asked.child[0], asked.child[1], int(asked.child[2]))))
        return 0
    console = Console(width=118)
    start(console)
    names, pixels = (("resnet18",), 64) if asked.quick else (asked.networks, 224)
    with progress_bar(console) as progress:
        rows = [
            in_child((name, init, str(pixels)), timeout=600)
            for name, init in progress.track([(n, i) for n in names for i in INITS])
        ]
    show(console, "Cost of insertion", rows)
    if asked.out is not None:
        save(asked.out, "insert_cost", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
