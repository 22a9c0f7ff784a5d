"""What merging linear maps saves: latency on one thread of onnxruntime, three files in turns.

The file of torch.onnx.export from the network as it trains, bnfx's with branches merged alone, and
bnfx's with sequences merged too. A ratio below 1 is a gain. The sweep holds the rule by which
merging decides against widths where it should not merge, and ones where it just should.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fold_networks import build, randomise
from fold_peers import export
from linear_families import FAMILIES, SIDE, WIDTH, swept
from measuring import progress_bar, save, show, start
from rich.console import Console
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import FoldReport

Entry = tuple[str, Callable[[], nn.Module], Tensor]

NETWORKS = ("torchvision:densenet121", "timm:fastvit_t8", "timm:repvit_m0_9", "timm:mobileone_s0")
#: Channels between 1x1 and 3x3 of 64; the rule merges from 64 * 9 / 10 on.
WIDTHS = (16, 32, 48, 64, 80, 96, 128, 192)


def networks(
    asked: list[str], *, sweep: bool
) -> Iterator[tuple[str, Callable[[], nn.Module], Tensor]]:
    """Name, how it is built, and an input."""
    x = torch.randn(1, WIDTH, SIDE, SIDE)
    for name, block in FAMILIES.items():
        if not asked or name in asked:
            yield f"2 {name}", (lambda block=block: nn.Sequential(block(), block())), x  # type: ignore[misc]
    for between in WIDTHS if sweep else ():
        yield f"1x1(64->{between})->3x3", (lambda between=between: swept(between)), x  # type: ignore[misc]
    for name in NETWORKS if not asked else [name for name in asked if ":" in name]:
        yield name, (lambda name=name: build(name)), torch.randn(1, 3, 224, 224)  # type: ignore[misc]


def measure(name: str, made: nn.Module, x: Tensor, runs: int) -> dict[str, Any]:
    """One row."""
    model = randomise(made)
    apart = bnfx.fold_bn(model, (x,), merge_linear=False)
    merged = bnfx.fold_bn(model, (x,))
    told = bnfx.report(merged)
    assert isinstance(told, FoldReport)
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder) / f"{key}.onnx" for key in ("merged", "apart", "trained")}
        for graph, file in zip((merged, apart, model), files.values(), strict=True):
            export(graph, x, file)
        found = bnfx.benchmark_onnx(
            files["merged"],
            (x,),
            baseline=files["trained"],
            others={"apart": files["apart"]},
            num_runs=max(runs, 50),
            bn_fusions="on",
            floor=False,
        )
    arms = {arm.arm.partition(",")[0]: arm for arm in found.arms}
    ours, apart_, trained = arms["file"], arms["apart"], arms["baseline"]
    return {
        "network": name,
        "merges": len(told.merges),
        "BatchNorms left": told.left,
        "to branches merged": ours.median / apart_.median,
        "to trained": ours.median / trained.median,
        "fastest to branches merged": ours.fastest / apart_.fastest,
        "fastest to trained": ours.fastest / trained.fastest,
        "ms": 1e3 * ours.median,
        "spread": ours.spread,
        "ms, branches merged": 1e3 * apart_.median,
        "spread, branches merged": apart_.spread,
        "ms, trained": 1e3 * trained.median,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="two blocks, few runs")
    parser.add_argument("--networks", nargs="*", default=[], help="families or suite:name")
    parser.add_argument("--runs", type=int, default=60, help="timed runs of each")
    asked = parser.parse_args(argv)
    chosen = ["RepVGG", "SPAN-like"] if asked.quick else asked.networks
    console = Console()
    start(console)
    warnings.simplefilter("ignore")  # of torch, about its exporter
    todo = list(networks(chosen, sweep=not chosen))
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("networks", total=len(todo))
        for name, make, x in todo:
            torch.manual_seed(0)
            rows.append(measure(name, make(), x, asked.runs))
            save(asked.out, "linear_latency", rows)
            progress.advance(task)
    show(console, "Latency with linear maps merged", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
