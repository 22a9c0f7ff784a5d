"""Latency of folded networks on one thread, measured in turns with what they are compared with.

In onnxruntime: bnfx's file against torch.onnx.export's own, which folds too. In eager PyTorch: the
folded network against the unfolded one. A ratio below 1 is a gain. Thresholds are measured as well,
because there they can cost more than they save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fold_networks import build, example, randomise
from fold_peers import export, installed
from fold_zoo import arms
from measuring import progress_bar, save, show, start
from pictures_of_folding import draw_ratios
from rich.console import Console
from torch import Tensor, nn

import bnfx

#: Where folding changes much, where it changes nothing, and where it can hurt.
NETWORKS = (
    *("timm:fastvit_t8", "timm:levit_128s", "timm:inception_next_atto", "timm:resnetv2_18"),
    *("timm:repghostnet_050", "timm:xception41p", "torchvision:resnet18"),
    *("torchvision:mobilenet_v3_small", "torchvision:densenet121", "timm:convmixer_768_32"),
)


def eager(models: Sequence[nn.Module], x: Tensor, runs: int) -> list[float]:
    """Median seconds of each model, in turns; each goes first as often as the others."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for i in range(-2, runs):
            for k in range(len(models)):
                which = (i + k) % len(models)
                begun = time.perf_counter()
                models[which](x)
                if i >= 0:
                    times[which].append(time.perf_counter() - begun)
    return [statistics.median(seconds) for seconds in times]


def measure(network: str, runs: int) -> dict[str, Any]:
    """The ratios of one network."""
    model = randomise(build(network))
    x = example(network, model, full_size=True)[:1]
    folded = {name: bnfx.fold_bn(model, (x,), **options) for name, options in arms().items()}
    seconds = eager([model, *folded.values()], x, runs)
    row: dict[str, Any] = {"network": network, "eager ms, unfolded": 1e3 * seconds[0]}
    for name, each in zip(folded, seconds[1:], strict=True):
        row[f"eager: {name}"] = each / seconds[0]
    if not installed("onnxruntime"):
        return row
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs.onnx", Path(folder) / "ours.onnx"
        export(model, x, theirs)
        for name, made in folded.items():
            export(made, x, ours)
            report = bnfx.benchmark_onnx(ours, (x,), baseline=theirs, num_runs=max(runs, 50))
            row[f"onnxruntime: {name}"] = report.ratio
        row["onnxruntime ms, exporter"] = 1e3 * report.arms[1].median
    return row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one small network, few runs")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--runs", type=int, default=60, help="timed runs of each")
    asked = parser.parse_args(argv)
    networks = ["timm:test_byobnet"] if asked.quick else asked.networks
    console = Console()
    start(console)
    warnings.simplefilter("ignore")  # of torch, about its exporter
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("networks", total=len(networks))
        for network in networks:
            rows.append(measure(network, 5 if asked.quick else asked.runs))
            save(asked.out, "fold_latency", rows)
            progress.advance(task)
    show(console, "Latency over that of the unfolded network, or of the exporter's own file", rows)
    ratios = [key for key in rows[0] if key.partition(": ")[0] in ("eager", "onnxruntime")]
    draw_ratios(rows, ratios, asked.out / "fold_latency.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
