"""The verifier verified: faults put into files on purpose, and right files over many seeds.

    python examples/benchmarks/verifier.py            # every fault, 210 right files
    python examples/benchmarks/verifier.py --quick    # one network
    python examples/benchmarks/verifier.py --out examples/benchmarks/results

Every fault is put into every network that has a place for it, into a file as bnfx wrote it and into
one from which all that it said about itself was taken away. A fault counts as caught if the verdict
is not "passed", and as caught by decision if the weights, their structure or the outputs said so.
Right files are folded anew for every seed, and exported anew for the first few (all with --fresh);
each that does not pass is a false alarm.
The exit code is 1 if a fault was missed or an alarm was false.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from measuring import save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bnfx

sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests are no installed package

from tests.support.fault_networks import NETWORKS, Network
from tests.support.faults import Fault, all_faults, strip_claims

Source = tuple[torch.nn.Module, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Outcome:
    """One faulty file.

    Attributes:
        network: Name of the network.
        fault: Name of the fault.
        stripped: Whether the file says nothing about itself.
        caught: Whether it did not pass.
        by: What saw it first: "weights", "structure", "layers", "outputs" or "error".
        message: What was said.
    """

    network: str
    fault: str
    stripped: bool
    caught: bool
    by: str
    message: str


def export(network: Network, seed: int, f: Path) -> Source:
    """A right file, folded and exported from random weights."""
    model, example = network.made(seed)
    folded = bnfx.fold_bn(model, example)
    bnfx.export_onnx(folded, example, f, dynamic_shapes=network.dynamic)
    return model, example


def judge(
    network: Network,
    fault: Fault,
    clean: onnx.ModelProto,
    source: Source,
    f: Path,
    *,
    stripped: bool,
) -> Outcome | None:
    """What the verifier says of one faulty file; None where the fault has no place."""
    faulty = onnx.ModelProto()
    faulty.CopyFrom(clean)
    if not fault.inject(network, source[0], faulty):
        return None
    if stripped:
        strip_claims(faulty)
    onnx.save(faulty, str(f))
    try:
        report = bnfx.verify_onnx(source[0], f, source[1], isolate=False)
    except bnfx.BnfxError as error:
        return Outcome(network.name, fault.name, stripped, True, "error", str(error)[:300])
    by = report.divergence.tier if report.divergence is not None else ""
    return Outcome(
        network.name, fault.name, stripped, not report, by, report.first_divergence or ""
    )


def inject_all(networks: tuple[Network, ...], folder: Path, console: Console) -> list[Outcome]:
    """Every fault in every network, claims kept and stripped."""
    outcomes = []
    with Progress(console=console, transient=True) as progress:
        for network in progress.track(networks, description="faults"):
            source = export(network, 0, folder / "right.onnx")
            clean = onnx.load(str(folder / "right.onnx"))
            for fault in all_faults():
                for stripped in (False, True):
                    outcome = judge(
                        network, fault, clean, source, folder / "faulty.onnx", stripped=stripped
                    )
                    outcomes += [outcome] if outcome is not None else []
    return outcomes


def exchange_weights(network: Network, seed: int, f: Path, right: Path) -> Source | None:
    """Write `f` as the graph of `right` with the folded weights of another seed.

    None where the graph holds a weight in another layout, or lacks one because the exporter folded
    it into another, so that it must be exported anew.
    """
    model, example = network.made(seed)
    folded = dict(bnfx.fold_bn(model, example).state_dict())
    proto = onnx.load(str(right))
    held = {tensor.name for tensor in proto.graph.initializer}
    if any(value.is_floating_point() and name not in held for name, value in folded.items()):
        return None
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        value = folded.get(tensor.name)
        if value is None or list(value.shape) != list(tensor.dims):
            return None
        array = value.detach().numpy()
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, str(f))
    return model, example


def pass_all(
    networks: tuple[Network, ...], seeds: int, fresh: int, folder: Path, console: Console
) -> tuple[int, list[str]]:
    """Right files over many seeds: how many there were, and the false alarms."""
    alarms = []
    jobs = [(network, seed) for network in networks for seed in range(1, seeds + 1)]
    right, f = folder / "right.onnx", folder / "other.onnx"
    with Progress(console=console, transient=True) as progress:
        for network, seed in progress.track(jobs, description="right files"):
            source = None if seed <= fresh else exchange_weights(network, seed, f, right)
            path = right if source is None else f
            model, example = export(network, seed, right) if source is None else source
            report = bnfx.verify_onnx(model, path, example, isolate=False)
            if not report:
                alarms.append(f"{network.name}, seed {seed}: {report.first_divergence}")
    return len(jobs), alarms


def summary(outcomes: list[Outcome]) -> list[dict[str, object]]:
    """One row for each network, with and without claims: how many faults, and what saw them."""
    rows: list[dict[str, object]] = []
    for network, stripped in sorted({(o.network, o.stripped) for o in outcomes}):
        mine = [o for o in outcomes if (o.network, o.stripped) == (network, stripped)]
        by = Counter(o.by for o in mine if o.caught)
        seen = {name: by[name] for name in ("weights", "structure", "layers", "outputs", "error")}
        row = {"network": network, "claims": "stripped" if stripped else "kept"}
        rows.append({**row, "faults": len(mine), "caught": sum(o.caught for o in mine), **seen})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one network, three right files")
    parser.add_argument("--seeds", type=int, default=30, help="right files of each network")
    parser.add_argument("--fresh", action="store_true", help="export every right file anew")
    parser.add_argument("--json", type=Path, help="where to write every outcome")
    parser.add_argument("--out", type=Path, help="folder for verifier.csv and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    console = Console(width=118)
    networks = NETWORKS[:1] if options.quick else NETWORKS
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outcomes = inject_all(networks, folder, console)
        seeds = 3 if options.quick else options.seeds
        fresh = seeds if options.fresh else 3
        right, alarms = pass_all(networks, seeds, fresh, folder, console)
    missed = [outcome for outcome in outcomes if not outcome.caught]
    table = Table("seen first by", "faults", title="Faults caught")
    for by, count in Counter(o.by for o in outcomes if o.caught).most_common():
        table.add_row(by, str(count))
    console.print(table)
    kinds = len({(o.network, o.fault) for o in outcomes})
    console.print(
        f"{len(outcomes)} faulty files ({kinds} faults in {len(networks)} networks, with and "
        f"without what the file says about itself): {len(outcomes) - len(missed)} caught, "
        f"{len(missed)} missed"
    )
    console.print(f"{right} right files: {len(alarms)} false alarms")
    for line in [*(f"missed: {o}" for o in missed), *(f"false alarm: {a}" for a in alarms)]:
        console.print(line, markup=False)
    console.print(f"{time.perf_counter() - start:.0f} s")
    if options.json is not None:
        told = {"outcomes": [asdict(o) for o in outcomes], "right": right, "alarms": alarms}
        options.json.write_text(json.dumps(told, indent=1))
    if options.out is not None:
        save(options.out, "verifier", summary(outcomes), right=right, alarms=alarms)
    return 1 if missed or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
