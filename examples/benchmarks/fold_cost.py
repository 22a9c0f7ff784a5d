"""What folding costs: time against torch.fx's fuse, memory beyond the source, growth with size.

Time is processor time of this one thread, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from fold_networks import build, randomise
from fold_peers import fx_fuse
from measuring import peak_bytes, progress_bar, reset_peak, resident_bytes, save, show, start
from pictures_of_folding import draw_line
from rich.console import Console
from torch import Tensor, nn

import bnfx
from bnfx.graphs.examples import example as as_example
from bnfx.graphs.inference import inference_graph

UNTOUCHED = "200 MB untouched"


class Chain(nn.Module):
    """Residual blocks in a row, activation first: every BatchNorm takes part in one joint solve."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(blocks))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4, H, W)."""
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(torch.relu(norm(x)))
        out: Tensor = self.head(x)
        return out


class Untouched(nn.Module):
    """One convolution to fold, and 200 MB of weights that have nothing to do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16, 50_000), nn.GELU(), nn.Linear(50_000, 1000))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1000)."""
        out: Tensor = self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
        return out


def seconds(act: Callable[[], object]) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    act()
    return time.process_time() - begun


def against_fuse(model: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    """Medians of fold_bn, of its capture, and of torch.fx's fuse, in turns."""
    acts: tuple[Callable[[], object], ...] = (
        lambda: bnfx.fold_bn(model, (x,)),
        lambda: inference_graph(model, as_example((x,), None)),
        lambda: fx_fuse(model),
    )
    bnfx.fold_bn(Chain(1).eval(), (x,))  # what the first call imports is not its cost
    rows = [[seconds(act) for act in acts] for _ in range(rounds)]
    fold, capture, fuse = (statistics.median(column) for column in zip(*rows, strict=True))
    aside = statistics.median(row[0] - row[1] for row in rows)
    return {
        "fold_bn, s": fold,
        "capture, s": capture,
        "fold_bn, capture aside, s": aside,
        "torch.fx fuse, s": fuse,
        "at most fuse + 1 s": aside <= fuse + 1,
    }


def memory(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Peak beyond the source in bytes, against those of the weights that changed."""
    bnfx.fold_bn(Chain(1).eval(), (x,))
    reset_peak()
    before = resident_bytes()
    folded = bnfx.fold_bn(model, (x,))
    peak = peak_bytes() - before
    sizes = {name: t.numel() * t.element_size() for name, t in folded.state_dict().items()}
    source = model.state_dict()
    changed = sum(
        size
        for name, size in sizes.items()
        if name not in source or not torch.equal(source[name], folded.state_dict()[name])
    )
    total = sum(t.numel() * t.element_size() for t in source.values())
    return {
        "source, MB": total / 1e6,
        "changed weights, MB": changed / 1e6,
        "peak beyond the source, MB": peak / 1e6,
        "at most changed + 5 % of the source": peak <= changed + 0.05 * total,
    }


def memory_of(name: str) -> dict[str, Any]:
    """The row of a network; in a process of its own, where nothing freed before can be used."""
    torch.set_num_threads(1)
    net = randomise(Untouched() if name == UNTOUCHED else build(f"torchvision:{name}"))
    return {"network": name, **memory(net, torch.randn(1, 3, 64, 64))}


def growth(sizes: list[int], tick: Callable[[], object]) -> list[dict[str, Any]]:
    """Seconds of folding, capture aside, over the number of nodes."""
    rows, x = [], torch.randn(1, 3, 8, 8)
    for blocks in sizes:
        model = randomise(Chain(blocks))
        given = as_example((x,), None)
        nodes = len(inference_graph(model, given).module.graph.nodes)
        aside = seconds(lambda: bnfx.fold_bn(model, (x,))) - seconds(  # noqa: B023  # called at once
            lambda: inference_graph(model, given)  # noqa: B023  # likewise
        )
        rows.append({"blocks": blocks, "nodes": nodes, "seconds": aside,
                     "milliseconds per node": 1e3 * aside / nodes})  # fmt: skip
        tick()
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="small networks, once")
    asked = parser.parse_args(argv)
    console = Console()
    start(console)
    warnings.simplefilter("ignore")  # of torch.fx's fuse
    sizes = [2, 4] if asked.quick else [12, 25, 50, 100, 150, 200, 250]
    x = torch.randn(1, 3, 64, 64)
    with progress_bar(console) as progress:
        task = progress.add_task("folding", total=len(sizes) + (2 if asked.quick else 4))
        name = "resnet18" if asked.quick else "resnet50"
        net = randomise(build(f"torchvision:{name}"))
        costs = [{"network": name, **against_fuse(net, x, 1 if asked.quick else 5)}]
        progress.advance(task)
        apart = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
        peaks = []
        for each in [name] if asked.quick else ["resnet18", name, UNTOUCHED]:
            peaks.append(apart.submit(memory_of, each).result())
            progress.advance(task)
        apart.shutdown()
        grown = growth(sizes, lambda: progress.advance(task))
    show(console, "Time", costs)
    show(console, "Memory", peaks)
    show(console, "Growth", grown)
    save(asked.out, "fold_cost", [*costs, *peaks, *grown])
    nodes = [float(row["nodes"]) for row in grown]
    draw_line(nodes, {"fold_bn, capture aside": [row["seconds"] for row in grown]},
              asked.out / "fold_cost.png")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
