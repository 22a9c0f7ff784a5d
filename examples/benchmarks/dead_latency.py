"""Latency of a ResNet-18 without its dead channels, against the same folded with them, in turns.

A share of gammas is zero, chosen at random: inside the blocks alone, or in the residual streams
too, where all that write a stream agree; with betas of zero, or with any, so that channels are
constants that a layer which pads zeros must be told of. onnxruntime, CPU, one thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from fold_networks import build, example, randomise
from measuring import progress_bar, save, show, start
from rich.console import Console
from torch import Tensor, nn

import bnfx

#: Goals: the ratio to the folded network with all its channels.
GOALS = {
    ("inside blocks", 0.3): 0.80,
    ("with streams", 0.3): 0.60,
    ("inside blocks", 0.5): 0.57,
    ("with streams", 0.5): 0.30,
    ("constants, inside blocks", 0.5): 0.68,
    ("constants, with streams", 0.5): 0.45,
}


def thinned(model: nn.Module, share: float, where: str) -> nn.Module:
    """`model`, a ResNet, with a share of its gammas zero."""
    generator = torch.Generator().manual_seed(0)
    constants, streams = where.startswith("constants"), where.endswith("with streams")
    chosen: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, norm in model.named_modules():
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            inside = path.count(".") == 2 and path.endswith("bn1")
            if not (inside or streams):
                continue
            key = path if inside else f"stream of {len(norm.weight)}"
            drawn = torch.randperm(len(norm.weight), generator=generator)
            dead = chosen.setdefault(key, drawn[: round(share * len(norm.weight))])
            norm.weight[dead] = 0.0
            if not constants:
                norm.bias[dead] = 0.0
    return model


def measure(network: str, where: str, share: float, runs: int) -> dict[str, Any]:
    """One row."""
    model = thinned(randomise(build(network)), share, where)
    x = example(network, model, full_size=True)[:1]
    folded = bnfx.fold_bn(model, (x,))
    slim = bnfx.fold_bn(model, (x,), drop_dead=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("slim.onnx", "folded.onnx")]
        for made, file in zip((slim, folded), files, strict=True):
            bnfx.export_onnx(made, (x,), file)
        passed = bool(bnfx.verify_onnx(model, files[0], (x,), num_inputs=2))
        report = bnfx.benchmark_onnx(files[0], (x,), baseline=files[1], num_runs=max(50, runs))
    sizes = [sum(p.numel() for p in made.parameters()) for made in (folded, slim)]
    return {
        "network": network,
        "dead": share,
        "where": where,
        "weights": sizes[1] / sizes[0],
        "latency": report.ratio,
        "goal": GOALS.get((where, share)),
        "ms, folded": 1e3 * report.arms[1].median,
        "verified": passed,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one case, few runs")
    parser.add_argument("--network", default="torchvision:resnet18")
    parser.add_argument("--runs", type=int, default=60, help="timed runs of each")
    asked = parser.parse_args(argv)
    cases = list(GOALS)[: 1 if asked.quick else None]
    console = Console()
    start(console)
    warnings.simplefilter("ignore")  # of torch, about its exporter
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("cases", total=len(cases))
        for where, share in cases:
            rows.append(measure(asked.network, where, share, 50 if asked.quick else asked.runs))
            save(asked.out, "dead_latency", rows)
            progress.advance(task)
    show(console, "Weights and latency over those of the folded network with all channels", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
