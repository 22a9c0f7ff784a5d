"""BatchNorms left in a model of the user's own class: fold_bn(form="module") and its peers.

timm's `reparameterize_model` merges the branches of networks that say how, torch.ao's `fuse_fx` and
torch.fx's `fuse` fold what stands right behind a convolution (and give a graph), and the models of
ultralytics have a method `fuse`. Each gets a float64 copy with drawn statistics; the error is the
largest difference of the outputs, relative to the largest output. A peer that is not installed or
refuses leaves its cells empty.

    python examples/benchmarks/form_module.py                  # writes results/form_module.csv
    python examples/benchmarks/form_module.py timm:resnet18 yolo11n
"""

from __future__ import annotations

import copy
import csv
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fold_peers as peers
import torch
from fold_networks import build, randomise
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import fuse_fx
from torch.utils import _pytree as pytree

import bnfx

NETWORKS = (
    *("timm:resnet18", "timm:resnetv2_18", "timm:mobilenetv2_100", "timm:mobilenetv3_small_100"),
    *("timm:regnety_002", "timm:repvgg_a0", "timm:mobileone_s0", "timm:levit_128s", "yolo11n"),
)
RESULT = Path(__file__).parent / "results" / "form_module.csv"


def opened(package: str) -> Any:
    """A package that is no dependency."""
    return importlib.import_module(package)


def timm_reparameterized(model: nn.Module, _: Tensor) -> nn.Module:
    """Timm's own merging of branches, for the networks that define it."""
    done: nn.Module = opened("timm.utils").reparameterize_model(model)
    return done


def ultralytics_fused(model: nn.Module, _: Tensor) -> nn.Module:
    """The method that ultralytics' models have."""
    theirs: Any = model
    done: nn.Module = theirs.fuse(verbose=False)
    return done


FOLDS: Mapping[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "bnfx, module": lambda model, x: bnfx.fold_bn(model, (x,), form="module"),
    "bnfx, graph": lambda model, x: bnfx.fold_bn(model, (x,)),
    "timm": timm_reparameterized,
    "torch.ao": lambda model, _: fuse_fx(model),
    "torch.fx": lambda model, _: peers.fx_fuse(model),
    "ultralytics": ultralytics_fused,
}


def network(name: str) -> nn.Module:
    """A network by its name, in float64."""
    if not name.startswith("yolo"):
        return randomise(build(name)).double()
    model: nn.Module = opened("ultralytics.nn.tasks").DetectionModel(f"{name}.yaml", verbose=False)
    return randomise(model.eval()).double()


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The floating-point tensors that it returns."""
    with torch.no_grad():
        found = pytree.tree_leaves(model(x))
    return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]


def measure(name: str) -> dict[str, Any]:
    """A row of the table."""
    model, x = network(name), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    if "levit" in name:
        x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    truth = outputs(model, x)
    row: dict[str, Any] = {"network": name, "BN": peers.evaluations(model, x)}
    for peer, fold in FOLDS.items():
        try:
            folded = fold(copy.deepcopy(model), x)
            ours = outputs(folded, x)
        except Exception as refusal:  # noqa: BLE001  # that a peer fails is a result
            print(
                f"{name}, {peer}: {type(refusal).__name__}: {str(refusal)[:100]}", file=sys.stderr
            )
            continue
        row[f"left: {peer}"] = peers.evaluations(folded, x)
        pairs = zip(ours, truth, strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        row[f"error: {peer}"] = f"{error:.1e}"
        row[f"class kept: {peer}"] = type(folded) is type(model)
    return row


def main(names: list[str]) -> int:
    """Measure, print, and write the table where all networks were asked for."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    chosen = names or [
        n for n in NETWORKS if not n.startswith("yolo") or importlib.util.find_spec("ultralytics")
    ]
    rows = []
    for name in chosen:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    if not names:
        heads = ["network", "BN"]
        heads += [f"{what}: {peer}" for peer in FOLDS for what in ("left", "error", "class kept")]
        with RESULT.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, heads, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
