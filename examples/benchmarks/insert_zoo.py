"""insert_bn on networks of torchvision, timm and transformers: inserted, skipped, failed.

For each network: BatchNorm is inserted with example inputs; every affine layer must have a record;
the result must run forward and backward in train mode and forward in eval mode; and inserting
identities instead must leave the eval output where it was (insert_bn checks that itself). Networks
above 25 million parameters run on torch's meta device: all code runs, no numbers are computed.

Writes insert_zoo.csv and insert_zoo.json into --out, and prints what failed, by name. A failure is
an exception, a layer without a record, or a missing gradient; skipped layers are counted, and
their reasons listed in the JSON file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from insert_networks import Network, timm_networks, torchvision_networks, transformers_networks
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import bnfx
from bnfx.editing.affine_calls import affine_modules
from bnfx.reports.report import InsertReport

_LARGE = 25_000_000
_SUITES = {
    "torchvision": torchvision_networks,
    "timm": timm_networks,
    "transformers": transformers_networks,
}
_QUICK = ("squeezenet1_1", "mobilenet_v3_small", "lcnetv2", "BertForSeq", "GPT2", "shvit")


def measure(network: Network) -> dict[str, Any]:
    """One row of the table."""
    model, args, kwargs = _ready(network)
    device = next(model.parameters()).device
    start = time.perf_counter()
    _step(model, args, kwargs)
    forward_backward = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    forward = time.perf_counter() - start
    model.train()
    start = time.perf_counter()
    inserted = bnfx.insert_bn(model, args, example_kwargs=kwargs)
    seconds = time.perf_counter() - start
    report = bnfx.report(inserted)
    assert isinstance(report, InsertReport)
    missing = {path for path, _, _ in affine_modules(model)} - {s.path for s in report.sites}
    if missing:
        raise AssertionError(f"no record of {sorted(missing)[:5]}")
    _train(inserted, report, args, kwargs)
    with torch.no_grad():
        inserted.eval()(*args, **kwargs)
    if device.type != "meta":
        bnfx.insert_bn(model, args, example_kwargs=kwargs, init="identity")
    actions = Counter(site.action for site in report.sites)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device.type,
        "batch_norms_before": sum(isinstance(m, _BatchNorm) for m in model.modules()),
        "layers": len(report.sites),
        "inserted": actions["inserted"],
        "skipped": actions["skipped"],
        "graph": isinstance(inserted, torch.fx.GraphModule),
        "seconds": seconds,
        "forward": forward,
        "forward_backward": forward_backward,
        "ratio": seconds / forward,
        "reasons": dict(Counter(_kind(s.reason) for s in report.sites if s.action == "skipped")),
    }


def _ready(network: Network) -> tuple[nn.Module, Any, Any]:
    """The network with inputs that fit, on the meta device if it is large and runs there."""
    meta = torch.device("meta")
    try:
        with meta:
            model = network.build()
    except (NotImplementedError, RuntimeError):  # it computes with values when it is made
        model = network.build()
    if sum(p.numel() for p in model.parameters()) > _LARGE:
        try:
            return (model.to(meta), *_fitting(network, model, meta))
        except (NotImplementedError, RuntimeError):  # or when it runs
            pass
    model = network.build()
    return (model, *_fitting(network, model, torch.device("cpu")))


def _fitting(network: Network, model: nn.Module, device: torch.device) -> tuple[Any, Any]:
    """Inputs of the smallest size that the network takes."""
    for side in network.sides:
        args, kwargs = pytree.tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x,
            (network.inputs(side), network.kwargs),
        )
        try:
            with torch.no_grad():
                model.train()(*args, **kwargs)
        except (RuntimeError, AssertionError, ValueError):
            if side == network.sides[-1]:
                raise
            continue
        return args, kwargs
    raise AssertionError(f"{network.name} has no sizes to try")


def _step(model: nn.Module, args: Any, kwargs: Any) -> None:
    _loss(model.train()(*args, **kwargs)).backward()
    model.zero_grad(set_to_none=True)


def _loss(outputs: Any) -> Tensor:
    leaves = pytree.tree_leaves(
        dict(outputs) if isinstance(outputs, dict) else outputs,
    )
    floats = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return torch.stack([x.float().square().mean() for x in floats]).sum()


def _train(model: nn.Module, report: InsertReport, args: Any, kwargs: Any) -> None:
    """Forward and backward in train mode; every new gamma must get a gradient."""
    _loss(model.train()(*args, **kwargs)).backward()
    for site in report.sites:
        if site.bn_path is None:
            continue
        norm = model.get_submodule(site.bn_path)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if norm.weight.requires_grad and norm.weight.grad is None:
            raise AssertionError(f"no gradient at {site.bn_path}")


def _kind(reason: str) -> str:
    """A reason without the names in it, to count equal ones."""
    return reason.partition(" by ")[0].partition(", ")[0].partition(": ")[0].split("'")[0].strip()


def _rows(networks: Iterable[Network], out: Path, console: Console) -> list[dict[str, Any]]:
    """All rows; files are written after each, and what went well in an earlier run is kept."""
    rows = _earlier(out)
    done = {(row["suite"], row["network"]) for row in rows}
    left = [n for n in networks if (n.suite, n.name) not in done]
    for network in track(left, "inserting", console=console):
        row = {"suite": network.suite, "network": network.name}
        try:
            rows.append({**row, "status": "ok", **measure(network)})
        except Exception as error:  # noqa: BLE001  # a zoo raises anything; the table says what
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            rows.append({**row, "status": "failed", "error": text})
            console.print(f"{network.name}: {text}", markup=False)
        write(rows, out)
    return rows


def _earlier(out: Path) -> list[dict[str, Any]]:
    path = out / "insert_zoo.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["status"] == "ok"]


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """The table as CSV, and everything as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    columns = [*dict.fromkeys(key for row in rows for key in row if key != "reasons")]
    with (out / "insert_zoo.csv").open("w", newline="") as f:
        table = csv.DictWriter(f, columns, extrasaction="ignore")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    summary = {"versions": versions, "machine": machine, "rows": rows}
    (out / "insert_zoo.json").write_text(json.dumps(summary, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Run the zoo; 1 if a network failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--suites", nargs="+", choices=_SUITES, default=[*_SUITES])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--quick", action="store_true", help="six small networks")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the networks' own code
    only = _QUICK if options.quick else options.only
    found = itertools.chain.from_iterable(_SUITES[suite]() for suite in options.suites)
    console = Console(stderr=True)
    wanted = (network for network in found if any(part in network.name for part in only))
    rows = _rows(wanted, options.out, console)
    good = [row for row in rows if row["status"] == "ok"]
    console = Console()
    console.print(f"{len(good)} of {len(rows)} networks, in {options.out}/insert_zoo.csv")
    if good:
        ratio = statistics.median(row["ratio"] for row in good if row["device"] != "meta")
        console.print(f"insertion takes {ratio:.1f} forward passes (median)")
    return 0 if len(good) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
