"""bnfx on a GPU, in a run of at most eight minutes: what ran where, in which arithmetic, how fast.

Four parts, each cut off where the time is up; what was found until then is written. Canaries: in
which arithmetic the provider computes. Networks: folded, exported and verified in float32 proper,
TF32, float16 and bfloat16, with the nodes of each provider and the copies between devices. Latency:
the exporter's file, the folded one, one folded with further options, and the floor, in turns; with
CUDA graphs too. Tests: those that need a GPU. Nothing is fetched; weights are random.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from fold_latency import NETWORKS as TIMED
from fold_networks import build, randomise
from measuring import ROOT, environment, save, show
from rich.console import Console

import bnfx
from bnfx.runtime.canary import require_arithmetic
from bnfx.runtime.providers import Where

Precision = Literal["fp32", "tf32", "fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NETWORKS = (
    *("torchvision:mobilenet_v3_small", "torchvision:resnet50", "torchvision:efficientnet_b0"),
    *("torchvision:regnet_y_400mf", "torchvision:densenet121"),
)
#: Beyond what `fold_bn` does by itself.
OPTIONS: dict[str, Any] = {"thresholds": True}
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to run, where, and for how long."""

    provider: str
    networks: tuple[str, ...]
    timed: tuple[str, ...]
    batches: tuple[int, ...]
    #: Of the images that are verified; the reference runs on the CPU.
    size: int
    #: Of the images that are measured.
    timed_size: int
    runs: int
    #: When to stop, by `time.perf_counter`.
    until: float


def canaries(plan: Plan) -> Iterator[Row]:
    """The arithmetic of each kind of layer in each precision."""
    for precision in get_args(Precision):
        try:
            told = require_arithmetic(Where.of(plan.provider), precision).told()
        except bnfx.ProviderError as error:
            yield {"precision": precision, "failed": str(error)}
            continue
        for key in ("arithmetic", "sums", "not tried"):
            for layer, found in told.get(key, {}).items():
                back = f"{told['canary'][layer]:.9f}" if layer in told["canary"] else ""
                yield {"precision": precision, "layer": layer, "found": found, "came back": back}


def networks(plan: Plan) -> Iterator[Row]:
    """Each network the whole way, in each precision."""
    for name in plan.networks:
        model = randomise(build(name))
        for precision in get_args(Precision):
            about = {"network": name, "precision": precision}
            try:
                yield about | _deployed(plan, copy.deepcopy(model), precision)
            except bnfx.BnfxError as error:  # CUDA lacks much of bfloat16
                yield about | {"failed": f"{type(error).__name__}: {error}"}


def _deployed(plan: Plan, model: torch.nn.Module, precision: Precision) -> Row:
    dtype = DTYPES.get(precision, torch.float32)
    x = torch.randn(2, 3, plan.size, plan.size)
    with tempfile.TemporaryDirectory() as folder:
        done = bnfx.deploy(
            model.to(dtype),
            x.to(dtype),
            Path(folder) / "net.onnx",
            provider=plan.provider,
            precision=precision,
            dynamic_shapes=({0: "batch"},),
            num_inputs=2,
            batch_sizes=(1,),
        )
    found = done.verify
    nodes = ", ".join(f"{count} on {name}" for name, count in found.providers.items())
    return {
        "status": found.status,
        "ratio": found.worst_ratio,
        "nodes": nodes,
        "copies": found.proof["memcpy_nodes"],
        "arithmetic": found.proof.get("coarsest", ""),
        "BatchNorms left": found.batch_norms_left,
    }


def latencies(plan: Plan) -> Iterator[Row]:
    """The arms of each network at each batch, in float32 proper and in TF32, and as CUDA graphs."""
    for name in plan.timed:
        model = randomise(build(name))
        for batch in plan.batches:
            try:
                yield from _measured(plan, name, model, batch)
            except bnfx.BnfxError as error:
                failed = f"{type(error).__name__}: {error}"
                yield {"network": name, "batch": batch, "failed": failed}


def _measured(plan: Plan, name: str, model: torch.nn.Module, batch: int) -> Iterator[Row]:
    x = torch.randn(batch, 3, plan.timed_size, plan.timed_size)
    ways: list[tuple[Precision, dict[str, str]]] = [("tf32", {}), ("fp32", {})]
    if Where(plan.provider).on_nvidia:
        ways.append(("tf32", {"enable_cuda_graph": "1"}))
    with tempfile.TemporaryDirectory() as folder:
        files = {arm: Path(folder) / f"{arm}.onnx" for arm in ("exporter", "folded", "options")}
        bnfx.export_onnx(model, x, files["exporter"])
        bnfx.export_onnx(bnfx.fold_bn(model, (x,)), x, files["folded"])
        bnfx.export_onnx(bnfx.fold_bn(model, (x,), **OPTIONS), x, files["options"])
        for precision, options in ways:
            found = bnfx.benchmark_onnx(
                files["folded"],
                x,
                baseline=files["exporter"],
                others={"options": files["options"]},
                provider=plan.provider,
                provider_options=options,
                precision=precision,
                num_runs=plan.runs,
                bn_fusions="on",
                isolate=False,
            )
            yield {
                "network": name,
                "batch": batch,
                "precision": precision,
                "CUDA graph": bool(options),
                "device": found.device,
                "arithmetic": found.arithmetic,
                **{f"{arm.arm} ms": 1e3 * arm.median for arm in found.arms},
                "spread": max(arm.spread for arm in found.arms),
            }


def tests(plan: Plan) -> Iterator[Row]:
    """The tests that need a GPU, one by one; none may be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "tests"]
    environment = {**os.environ, "BNFX_REQUIRE_GPU": "1"}
    left = max(plan.until - time.perf_counter(), 1)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=left, capture_output=True, text=True
        )
        last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    except subprocess.TimeoutExpired:
        last = f"not done after {left:.0f} s"
    yield {"command": " ".join(command[1:]), "found": last}


#: What share of the time has passed when each part must end.
PARTS = {canaries: 0.1, networks: 0.45, latencies: 0.8, tests: 1.0}


def collect(plan: Plan, part: Callable[[Plan], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part until the time is up; what fails is a row too."""
    rows = part(plan)
    while True:
        if time.perf_counter() > plan.until:
            yield {"stopped": "the time is up"}
            return
        begun = time.perf_counter()
        try:
            row = next(rows)
        except StopIteration:
            return
        except (bnfx.BnfxError, ImportError) as error:
            yield {"stopped": f"{type(error).__name__}: {error}"}
            return
        yield row | {"seconds": round(time.perf_counter() - begun, 2)}


def plan_of(asked: argparse.Namespace) -> Plan:
    until = time.perf_counter() + asked.minutes * 60
    if asked.dry:
        small = ("timm:test_byobnet",)
        return Plan("cpu", small, small, (1,), 32, 32, 50, until)
    networks = tuple(asked.networks or NETWORKS)
    timed = tuple(asked.networks or TIMED)
    return Plan(asked.provider, networks, timed, (1, 32), 96, 224, 100, until)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--dry", "--quick", action="store_true", help="all of it small, on the CPU")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="after these nothing is begun")
    parser.add_argument("--networks", nargs="*")
    asked = parser.parse_args(argv)
    plan, console = plan_of(asked), Console(width=160)
    warnings.simplefilter("ignore")  # of torch, about its exporter
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()), style="dim")
    console.print(bnfx.doctor())
    begun, rows = time.perf_counter(), list[Row]()
    for part, share in PARTS.items():
        if asked.dry and part is tests:
            continue
        mine: list[Row] = []
        until = begun + share * (plan.until - begun)
        for row in collect(replace(plan, until=until), part):
            mine.append({"part": part.__name__, **row})
            save(asked.out, "gpu", [*rows, *mine], provider=plan.provider)
        rows += mine
        keys = list(dict.fromkeys(key for row in mine for key in row))
        show(console, part.__name__, [{key: row.get(key) for key in keys} for row in mine])
    failed = (row for row in rows if "failed" in row and row.get("precision") != "bf16")
    return int(any("stopped" in row for row in rows) or any(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
