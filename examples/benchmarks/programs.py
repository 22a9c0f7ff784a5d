"""The networks of timm and torchvision as exported programs: folded, saved, read, run.

Each network runs in a process of its own, in float64, as torch.export gives it and in core ATen.
What is done stands in programs.jsonl; a second run goes on from there.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import fold_peers as peers
import torch
from fold_networks import NETWORKS, build, example, randomise
from fold_zoo import distance, left_by, outputs
from measuring import in_child, progress_bar, save, show, start
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bnfx

#: A spread sample, for a first look.
SAMPLE = NETWORKS[::3]


def exported(model: nn.Module, x: Tensor) -> tuple[ExportedProgram, bool]:
    """The program, and whether its batch is free."""
    try:
        shapes = ({0: Dim("batch", min=2, max=64)},)
        return torch.export.export(model, (x,), dynamic_shapes=shapes), True
    except Exception:  # noqa: BLE001  # it may be that only the batch is in the way
        return torch.export.export(model, (x,)), False


def saved(program: ExportedProgram) -> ExportedProgram:
    """The same, from a file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def kept(folded: ExportedProgram, source: ExportedProgram) -> bool:
    """Whether all that is not edited is as it was."""
    mine, theirs = folded.graph_signature, source.graph_signature
    states = {name for name in folded.state_dict if name in source.state_dict}
    shapes = (folded.state_dict[n].dtype is source.state_dict[n].dtype for n in states)
    return (
        mine.user_inputs == theirs.user_inputs
        and [s.kind for s in mine.output_specs] == [s.kind for s in theirs.output_specs]
        and folded.call_spec == source.call_spec
        and folded.range_constraints == source.range_constraints
        and folded._guards_code == source._guards_code
        and [e.fqn for e in folded.module_call_graph] == [e.fqn for e in source.module_call_graph]
        and all(shapes)
    )


def network_row(network: str) -> dict[str, Any]:
    """What folding does to one network."""
    model = randomise(build(network))
    x = example(network, model).double()
    model = model.double()
    row: dict[str, Any] = {"BN": peers.evaluations(model, x)}
    row["left: module"] = left_by(bnfx.fold_bn(model, (x,)))
    try:
        program, row["open"] = exported(model, x)
    except Exception as refusal:  # noqa: BLE001  # that torch.export refuses it is a result
        return row | {"refused": f"{type(refusal).__name__}: {refusal}".partition("\n")[0][:200]}
    more = torch.cat([x, x.flip(0), x[:1]]) if row["open"] else x
    for name, source in (("plain", program), ("core", program.run_decompositions())):
        begun = time.perf_counter()
        folded = bnfx.fold_bn(source)
        row[f"seconds: {name}"] = time.perf_counter() - begun
        row[f"left: {name}"] = left_by(folded)
        read = saved(folded)
        assert bnfx.report(read) == bnfx.report(folded)
        row[f"error: {name}"] = max(
            distance(outputs(form.module(), images), outputs(source.module(), images))
            for form in (folded, read)
            for images in (x, more)
        )
        row[f"kept: {name}"] = kept(folded, source)
    return row


def child(network: str) -> int:
    """One network, as one line of JSON on standard output."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = network_row(network)
    except Exception as error:  # noqa: BLE001  # the parent goes on with the next network
        row = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print("\n" + json.dumps(row))
    return 0


def measure(network: str, timeout: float) -> dict[str, Any]:
    """The same in a process of its own."""
    return in_child([network], timeout)


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures in one line."""
    taken = [row for row in rows if "left: core" in row]
    found: dict[str, Any] = {"networks": len(rows), "taken by torch.export": len(taken)}
    found["with a free batch"] = sum(row["open"] for row in taken)
    found["BN"] = sum(row["BN"] for row in taken)
    for key in ("left: module", "left: plain", "left: core"):
        found[key] = sum(row[key] for row in taken)
    for name in ("plain", "core"):
        found[f"more left than in the module: {name}"] = sum(
            row[f"left: {name}"] > row["left: module"] for row in taken
        )
        found[f"worst error: {name}"] = max((row[f"error: {name}"] for row in taken), default=None)
        found[f"all else kept: {name}"] = sum(row[f"kept: {name}"] for row in taken)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--networks", nargs="*", help="such as timm:levit_128s; SAMPLE for some")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each network")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        return child(asked.child)
    networks = asked.networks or list(("timm:test_byobnet",) if asked.quick else NETWORKS)
    networks = list(SAMPLE) if networks == ["SAMPLE"] else networks
    console = Console()
    start(console)
    asked.out.mkdir(parents=True, exist_ok=True)
    log = asked.out / "programs.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    known = {row["network"]: row for row in map(json.loads, lines)}
    with progress_bar(console) as progress, log.open("a") as file:
        for network in progress.track([n for n in networks if n not in known]):
            known[network] = {"network": network, **measure(network, asked.timeout)}
            file.write(json.dumps(known[network]) + "\n")
            file.flush()
    rows = [known[network] for network in networks]
    summary = totals(rows)
    show(console, "In all", [summary])
    for row in rows:
        for key in ("failed", "refused"):
            if key in row:
                console.print(f"{row['network']} {key}: {row[key]}", markup=False, style="red")
    save(asked.out, "programs", rows, totals=summary)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
