"""Files of the zoo's networks folded by `fold_onnx` and by the optimisers of ONNX files.

    python examples/benchmarks/file_zoo.py --out results   # hours; a second run goes on
    python examples/benchmarks/file_zoo.py --networks timm:levit_128s

Each network is exported with `optimize=False` and with torch's default, in a process of its own.
"fold_bn + exporter" folds the model before the export: `fold_onnx` shall leave as few. Errors are
relative to the model in float64, latency is a median over runs in turns with one thread, memory is
what the step takes beyond what was there. What is done stands in file_zoo.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fold_peers as peers
import onnx
import torch
from fold_networks import NETWORKS, build, example, randomise
from fold_zoo import distance, outputs
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
from rich.console import Console
from torch import Tensor

import bnfx

EXPORTS = {"optimize=False": False, "default": True}
BEFORE, OURS, LIMIT = "the file", "bnfx", "fold_bn + exporter"
#: Tool -> a function that makes another model of the file at a path.
Tools = Mapping[str, Callable[[Path], onnx.ModelProto]]


def _bnfx(path: Path) -> onnx.ModelProto:
    out = path.with_name("bnfx.onnx")
    bnfx.fold_onnx(path, out, verify=False)
    return onnx.load(out)


def _onnxscript(path: Path) -> onnx.ModelProto:
    done = importlib.import_module("onnxscript.optimizer").optimize(onnx.load(path))
    assert isinstance(done, onnx.ModelProto)
    return done


TOOLS: Tools = {OURS: _bnfx, "onnxscript": _onnxscript, **peers.OPTIMISERS}


def session(path: Path, *, optimised: bool) -> Any:
    """A session with one thread."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, x: Tensor, *, optimised: bool = False) -> list[Tensor]:
    """What onnxruntime computes, in float64."""
    ready = session(path, optimised=optimised)
    found = ready.run(None, {ready.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(array).double() for array in found]


def latencies(files: Mapping[str, Path], x: Tensor, runs: int) -> dict[str, float]:
    """Median seconds of each file, in turns."""
    ready = {name: session(path, optimised=True) for name, path in files.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(runs + 1):
        for name, one in ready.items():
            feed = {one.get_inputs()[0].name: x.numpy()}
            begun = time.perf_counter()
            one.run(None, feed)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(found) or 0.0 for name, found in seconds.items()}


def measured(network: str, kind: str, runs: int, seconds: float) -> dict[str, Any]:
    """One network, exported in one way, with every tool."""
    model = randomise(build(network))
    x = example(network, model)
    truth = outputs(copy.deepcopy(model).double(), x.double())
    row: dict[str, Any] = {"side": x.shape[-1], "BN": peers.evaluations(model, x)}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.onnx"
        row[f"left: {BEFORE}"] = peers.count(
            peers.export(model, x, source, optimize=EXPORTS[kind])
        )[0]
        row[f"left: {LIMIT}"] = peers.count(
            peers.export(bnfx.fold_bn(model, (x,)), x, Path(name) / "limit.onnx")
        )[0]
        files = {BEFORE: source}
        for tool, optimise in TOOLS.items():
            if tool in peers.OPTIMISERS and not peers.installed(tool):
                continue
            reset_peak()
            before, begun = resident_bytes(), time.perf_counter()
            try:
                done = optimise(source)
            except Exception as refusal:  # noqa: BLE001  # a tool that fails is a result
                row[f"why: {tool}"] = f"{type(refusal).__name__}: {refusal}"[:200]
                continue
            row[f"seconds: {tool}"] = time.perf_counter() - begun
            row[f"peak / file: {tool}"] = (peak_bytes() - before) / source.stat().st_size
            row[f"left: {tool}"] = peers.count(done)[0]
            files[tool] = Path(name) / f"{tool}.onnx"
            onnx.save(done, files[tool])
        for tool, path in files.items():
            try:
                row[f"error: {tool}"] = distance(run(path, x), truth)
            except Exception as refusal:  # noqa: BLE001  # a file that does not run is a result
                row[f"why: {tool}"] = f"{type(refusal).__name__}: {refusal}"[:200]
        files = {tool: path for tool, path in files.items() if f"error: {tool}" in row}
        once = latencies(files, x, 1)
        turns = max(3, min(runs, int(seconds / max(sum(once.values()), 1e-9))))
        found = latencies(files, x, turns)
        row |= {f"latency: {tool}": took / found[BEFORE] for tool, took in found.items()}
    return row


def child(network: str, kind: str, runs: int, seconds: float) -> int:
    """One file, as one line of JSON on standard output."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = measured(network, kind, runs, seconds)
    except Exception as error:  # noqa: BLE001  # the parent goes on with the next network
        traceback.print_exc()
        row = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print("\n" + json.dumps(row))
    return 0


def measure(network: str, kind: str, asked: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    arguments = [network, "--export", kind, "--runs", str(asked.runs)]
    return in_child([*arguments, "--seconds", str(asked.seconds)], asked.timeout)


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each way to export and each tool, over the networks that it could handle."""
    found = []
    for kind in EXPORTS:
        for tool in (BEFORE, *TOOLS, LIMIT):
            had = [r for r in rows if r["export"] == kind and r.get(f"left: {tool}") is not None]
            pairs = [(r.get(f"error: {tool}"), r.get(f"error: {BEFORE}")) for r in had]
            ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
            found.append(
                {
                    "export": kind,
                    "tool": tool,
                    "files": len(had),
                    "failed": sum(f"why: {tool}" in r for r in rows if r["export"] == kind),
                    "left": sum(r[f"left: {tool}"] for r in had),
                    "left by bnfx there": sum(r.get(f"left: {OURS}") or 0 for r in had),
                    "without any left": sum(r[f"left: {tool}"] == 0 for r in had),
                    "seconds": median(r.get(f"seconds: {tool}") for r in had),
                    "peak / file": median(r.get(f"peak / file: {tool}") for r in had),
                    "error / file's": median(ratios),
                    "worst": max(ratios, default=None),
                    "latency / file's": median(r.get(f"latency: {tool}") for r in had),
                }
            )
    return [row for row in found if row["files"]]


def report(rows: list[dict[str, Any]], out: Path, console: Console) -> None:
    """Tables and files."""
    tools = (BEFORE, *TOOLS, LIMIT)
    left = [
        {"network": r["network"], "export": r["export"]}
        | {tool: r.get(f"left: {tool}") for tool in tools}
        for r in rows
        if "BN" in r
    ]
    show(console, "BatchNormalizations left, file by file", left)
    show(console, "In all", totals(rows))
    for row in rows:
        if "failed" in row:
            said = f"{row['network']}, {row['export']}: {row['failed']}"
            console.print(said, markup=False, style="red")
    save(out, "file_zoo", rows, totals=totals(rows))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--networks", nargs="*", help="such as timm:levit_128s")
    parser.add_argument("--runs", type=int, default=20, help="runs of each file, at most")
    parser.add_argument("--seconds", type=float, default=20, help="for the runs of one network")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--export", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        return child(asked.child, asked.export, asked.runs, asked.seconds)
    networks = asked.networks or list(("timm:test_byobnet",) if asked.quick else NETWORKS)
    console = Console()
    start(console)
    asked.out.mkdir(parents=True, exist_ok=True)
    log = asked.out / "file_zoo.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(row["network"], row["export"]) for row in rows}
    jobs = [(n, kind) for n in networks for kind in EXPORTS if (n, kind) not in known]
    with progress_bar(console) as progress, log.open("a") as file:
        task = progress.add_task("files", total=len(jobs))
        for network, kind in jobs:
            rows.append({"network": network, "export": kind, **measure(network, kind, asked)})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            progress.advance(task)
    report(rows, asked.out, console)
    return 1 if any("failed" in row for row in rows) and not asked.networks else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
