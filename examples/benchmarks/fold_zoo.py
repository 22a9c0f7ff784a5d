"""The networks of timm and torchvision folded by bnfx and by everyone else, side by side.

Each network runs in a process of its own with a time limit, in two stages: "fold" (PyTorch alone)
and "onnx" (exporters and optimisers). What is done stands in fold_zoo.jsonl; a second run goes on
from there. A figure that could not be had is empty, and the table of failures says why.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import fold_peers as peers
import torch
from fold_networks import NAMED, NETWORKS, build, example, randomise
from measuring import (
    in_child,
    median,
    peak_bytes,
    progress_bar,
    reset_peak,
    resident_bytes,
    save,
    show,
    start,
)
from pictures_of_folding import draw_left
from rich.console import Console
from torch import Tensor, nn
from torch.export import ExportedProgram

import bnfx
from bnfx.graphs.examples import example as as_example
from bnfx.graphs.inference import inference_graph

#: Ways to call fold_bn. The first is the default.
ARMS: dict[str, dict[str, Any]] = {
    "bnfx": {},
    "bnfx thresholds": {"thresholds": True},
    "bnfx thresholds, border maps": {"thresholds": True, "border_maps": True},
}

STAGES = ("fold", "onnx")

#: Pairs of images for the float32 error.
_PAIRS = 8


def arms() -> dict[str, dict[str, Any]]:
    """The ways that this fold_bn knows."""
    known = inspect.signature(bnfx.fold_bn).parameters
    return {name: options for name, options in ARMS.items() if options.keys() <= known.keys()}


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All outputs, in float64."""
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(model(x))
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]


def distance(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Root mean square of the difference, relative to that of the truth; the worst output."""
    pairs = zip(ours, truth, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)


def pooled(model: nn.Module, images: list[Tensor], truths: list[list[Tensor]]) -> float:
    """Root mean square of `distance` over all images: two alone say little of rounding."""
    pairs = zip(images, truths, strict=True)
    errors = [distance(outputs(model, x), truth) for x, truth in pairs]
    return math.hypot(*errors) / math.sqrt(len(errors))


def left_by(folded: nn.Module | ExportedProgram) -> int:
    """BatchNorms that a fold left behind."""
    records = bnfx.report(folded).to_dict()["batch_norms"]
    return sum(record["verdict"] != "folded" for record in records)


def fold_stage(network: str, negative: float, tiny: float) -> dict[str, Any]:
    """What folding in PyTorch leaves, how exact it is, what it costs."""
    model = randomise(build(network), negative=negative, tiny=tiny)
    x = example(network, model)
    wide = copy.deepcopy(model).double()
    row: dict[str, Any] = {"side": x.shape[-1], "BN": peers.evaluations(model, x)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    images = [x, *(torch.randn_like(x) for _ in range(1, _PAIRS))]
    truths = [outputs(wide, pair.double()) for pair in images]
    error = pooled(model, images, truths)
    reset_peak()
    before, begun = resident_bytes(), time.perf_counter()
    folded = bnfx.fold_bn(model, (x,))
    row["seconds"] = time.perf_counter() - begun
    row["peak / weights"] = (peak_bytes() - before) / sum(
        4 * tensor.numel() for tensor in model.state_dict().values()
    )
    begun = time.perf_counter()
    inference_graph(model, as_example((x,), None))
    row["seconds, capture aside"] = row["seconds"] - (time.perf_counter() - begun)
    row["float32 error ratio"] = pooled(folded, images, truths) / error
    for name, options in arms().items():
        narrow = bnfx.fold_bn(wide, (x.double(),), **options)
        row[f"left: {name}"] = left_by(narrow)
        row[f"float64 error: {name}"] = distance(outputs(narrow, x.double()), truths[0])
    try:
        fused = peers.fx_fuse(model)
        row["left: torch.fx fuse"] = peers.evaluations(fused, x)
        row["fuse: float32 error ratio"] = pooled(fused, images, truths) / error
    except Exception as refusal:  # noqa: BLE001  # fuse fails in many ways, which is a result
        row["why: torch.fx fuse"] = f"{type(refusal).__name__}: {refusal}"[:200]
    return row


def onnx_stage(network: str, negative: float, tiny: float) -> dict[str, Any]:
    """What is left in ONNX files."""
    model = randomise(build(network), negative=negative, tiny=tiny)
    x = example(network, model)
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "source.onnx"
        with peers.batch_norms_dropped():
            floor = peers.count(peers.export(model, x, Path(name) / "floor.onnx"))[1]
        ours = peers.count(peers.export(bnfx.fold_bn(model, (x,)), x, Path(name) / "bnfx.onnx"))
        row["operators: bnfx"] = ours[1] - floor
        row["left in ONNX: bnfx"] = ours[0]
        left, operators = peers.count(peers.export(model, x, path))
        row["left: exporter"], row["operators: exporter"] = left, operators - floor
        for peer, optimise in peers.OPTIMISERS.items():
            if not peers.installed(peer):
                continue
            try:
                row[f"left: {peer}"] = peers.count(optimise(path))[0]
            except Exception as refusal:  # noqa: BLE001  # an optimiser that fails is a result
                row[f"why: {peer}"] = f"{type(refusal).__name__}: {refusal}"[:200]
    return row


def child(network: str, stage: str, negative: float, tiny: float) -> int:
    """One stage of one network, as one line of JSON on standard output."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = fold_stage if stage == "fold" else onnx_stage
    try:
        row = run(network, negative, tiny)
    except Exception as error:  # noqa: BLE001  # the parent goes on with the next network
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print("\n" + json.dumps(row))
    return 0


def measure(network: str, stage: str, asked: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    arguments = [network, "--stage", stage, "--negative", str(asked.negative)]
    return in_child([*arguments, "--tiny", str(asked.tiny)], asked.timeout)


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each tool, over the networks that it could handle."""
    found = []
    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if key[:5] == "left:"]
    for key in keys:
        tool = key.partition(": ")[2]
        had = [row for row in rows if row.get(key) is not None and row.get("BN") is not None]
        found.append(
            {
                "tool": tool,
                "networks": len(had),
                "BN": sum(row["BN"] for row in had),
                "left": sum(row[key] for row in had),
                "left by bnfx there": sum(row.get("left: bnfx") or 0 for row in had),
                "without any left": sum(row[key] == 0 for row in had),
                "better than bnfx on": sum(
                    row[key] < row["left: bnfx"] for row in had if "left: bnfx" in row
                ),
            }
        )
    return found


def report(rows: list[dict[str, Any]], out: Path, console: Console) -> None:
    """Tables, files and the picture."""
    short = [
        {"network": row["network"], **{k: row.get(k) for k in _SHOWN}}
        for row in rows
        if "BN" in row
    ]
    summary = totals(rows)
    for ratio in ("float32 error ratio", "fuse: float32 error ratio"):
        had = [row[ratio] for row in rows if row.get(ratio) is not None]
        summary.append({"tool": f"{ratio}: median, worst", "networks": len(had),
                        "BN": median(had), "left": max(had, default=None)})  # fmt: skip
    show(console, "BatchNorms left, network by network", short)
    show(console, "In all", summary)
    for row in rows:
        if "failed" in row:
            console.print(f"{row['network']}: {row['failed']}", markup=False, style="red")
    save(out, "fold_zoo", rows, totals=summary)
    draw_left(rows, out / "fold_zoo.png")


_SHOWN = ("BN", "left: bnfx", "left: bnfx thresholds", "left: bnfx thresholds, border maps",
          "left: torch.fx fuse", "left: exporter", "left: onnxsim", "left: onnxruntime",
          "operators: bnfx", "operators: exporter", "float32 error ratio",
          "float64 error: bnfx", "seconds")  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--networks", nargs="*", help="such as timm:levit_128s; NAMED for the hard")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--negative", type=float, default=0.0, help="share of negative gammas")
    parser.add_argument("--tiny", type=float, default=0.0, help="share of gammas of 1e-6 to 1e-1")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each stage")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        return child(asked.child, asked.stage, asked.negative, asked.tiny)
    networks = asked.networks or list(("timm:test_byobnet",) if asked.quick else NETWORKS)
    networks = list(NAMED) if networks == ["NAMED"] else networks
    console = Console()
    start(console)
    asked.out.mkdir(parents=True, exist_ok=True)
    log = asked.out / "fold_zoo.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    known = {(row["network"], row["stage"]): row for row in map(json.loads, lines)}
    jobs = [(n, s) for s in asked.stages for n in networks if (n, s) not in known]
    with progress_bar(console) as progress, log.open("a") as file:
        task = progress.add_task("networks", total=len(jobs))
        for network, stage in jobs:
            row = {"network": network, "stage": stage, **measure(network, stage, asked)}
            known[network, stage] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(task)
    merged: dict[str, dict[str, Any]] = {}
    for (network, _), row in known.items():
        merged.setdefault(network, {}).update({k: v for k, v in row.items() if k != "stage"})
    report(list(merged.values()), asked.out, console)
    failures = Counter("failed" in row for row in known.values())[True]
    return 1 if failures and not asked.networks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
