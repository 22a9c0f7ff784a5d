"""What verification costs: seconds, and forwards of the torch model, on one core.

    python examples/benchmarks/verify_cost.py                 # ResNet-18 and ResNet-50, 224 pixels
    python examples/benchmarks/verify_cost.py --quick --out /tmp/results   # ResNet-18, 64 pixels
    python examples/benchmarks/verify_cost.py --large     # deploy weights of 2.25 GiB: peak memory

A file with a symbolic batch is verified against the unfolded model: 8 inputs of one image, and
batches of 2 and 7. Forwards are runs of the model on one image, measured in turns with the
verification. Localising is what naming the first wrong layer adds: a file with one channel of one
layer off by 1e-3 is verified with and without it. Processor time counts that of onnxruntime's own
process; it is what one core would take.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from measuring import median, peak_bytes, progress_bar, reset_peak, save, show, start
from rich.console import Console
from torch import Tensor, nn

import bnfx
from bnfx.cli.libraries import open_torchvision

NETWORKS = ("resnet18", "resnet50")

_WIDTH = 8192
_COPIES = 8  # of the weights, that deploying holds at most


def processor_seconds(call: Callable[[], Any]) -> float:
    """Processor time of this process and of those that it waited for."""
    before = os.times()
    call()
    after = os.times()
    return sum(b - a for a, b in zip(before[:4], after[:4], strict=True))


def trained(name: str) -> nn.Module:
    """A network with statistics and scales as after training."""
    model = getattr(open_torchvision(), name)(weights=None).eval()
    assert isinstance(model, nn.Module)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for key in ("weight", "running_var"):
                state[key].uniform_(0.5, 1.5)
            for key in ("bias", "running_mean"):
                state[key].normal_(0, 0.2)
    return model


def spoil(f: Path, wrong: Path) -> str:
    """Copy a file with one channel of a convolution in its middle off by 1e-3; return its name."""
    proto = onnx.load(str(f))
    weights = [t for t in proto.graph.initializer if len(t.dims) == 4]
    tensor = weights[len(weights) // 2]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] *= 1 + 1e-3
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, str(wrong))
    return str(tensor.name)


def measured(name: str, x: Tensor, repeats: int, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    model, f, wrong = trained(name), folder / f"{name}.onnx", folder / f"{name}.wrong.onnx"
    bnfx.export_onnx(bnfx.fold_bn(model, x), x, f, dynamic_shapes=({0: "batch"},))
    spoiled = spoil(f, wrong)
    found: dict[str, list[float]] = {}

    def timed(key: str, call: Callable[[], Any]) -> None:
        found.setdefault(key, []).append(processor_seconds(call))

    wall = []
    for _ in range(repeats):
        with torch.no_grad():
            for _ in range(5):
                begin = time.process_time()
                model(x)
                found.setdefault("forward", []).append(time.process_time() - begin)
        begin = time.perf_counter()
        timed("verify", lambda: bnfx.verify_onnx(model, f, x).raise_for_failure())
        wall.append(time.perf_counter() - begin)
        timed("wrong", lambda: bnfx.verify_onnx(model, wrong, x))
        timed("unlocalised", lambda: bnfx.verify_onnx(model, wrong, x, localize=False))
    said = bnfx.verify_onnx(model, wrong, x).first_divergence or ""
    forward, verify, failing, silent = (
        median(found[key]) or 0.0 for key in ("forward", "verify", "wrong", "unlocalised")
    )
    return {
        "network": name,
        "pixels": x.shape[-1],
        "forward_s": forward,
        "verify_wall_s": median(wall),
        "verify_s": verify,
        "verify_forwards": verify / forward,
        "wrong_s": failing,
        "localise_s": failing - silent,
        "named": spoiled in said and "channel 0" in said,
    }


class Large(nn.Module):
    """Linear layers of 8192 channels, each with a BatchNorm: a quarter of a GiB each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, _WIDTH, bias=False)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(_WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Of (batch, 16), to the same shape."""
        y: Tensor = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = torch.relu(norm(layer(y)))
        return y[:, :16]


def deployed(depth: int, folder: Path, console: Console) -> dict[str, Any]:
    """Deploy a model larger than an ONNX graph can hold; how long, and how much memory."""
    model, x = Large(depth).eval(), torch.randn(2, 16)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    need = _COPIES * weights
    free = available_bytes()
    if free < need:
        raise SystemExit(f"{free / 2**30:.1f} GiB are free, {need / 2**30:.1f} GiB are needed")
    for name, state in model.state_dict().items():
        if name.endswith("running_var"):
            state.uniform_(0.01, 0.05)
    reset_peak()
    peaks: dict[str, float] = {}
    doing = ["fold"]

    def tell(step: str) -> None:
        peaks[doing[-1]] = peak_bytes() / 2**30
        reset_peak()
        doing.append(step)
        console.print(f"{step} ...")

    begin = time.perf_counter()
    f = folder / "large.onnx"
    bnfx.deploy(model, x, f, dynamic_shapes=({0: "batch"},), progress=tell)
    peaks[doing[-1]] = peak_bytes() / 2**30
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 2**30
    return {
        "weights_gib": weights / 2**30,
        "deploy_wall_s": time.perf_counter() - begin,
        **{f"{step}_gib": peak for step, peak in peaks.items()},
        "onnxruntime_gib": child,
    }


def available_bytes() -> int:
    """Memory that is free for use, by /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18, 64 pixels, once")
    parser.add_argument("--repeats", type=int, default=3, help="verifications of each kind")
    parser.add_argument("--large", action="store_true", help="a model over 2 GiB, and nothing else")
    parser.add_argument("--out", type=Path, help="folder for verify_cost.csv and .json")
    options = parser.parse_args()
    console = Console(width=118)
    start(console)
    if options.large:
        with tempfile.TemporaryDirectory() as folder:
            show(console, "Deploying", [deployed(9, Path(folder), console)])
        return 0
    names = NETWORKS[:1] if options.quick else NETWORKS
    pixels, repeats = (64, 1) if options.quick else (224, options.repeats)
    rows = []
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as progress:
        for name in progress.track(names, description="verifying"):
            torch.manual_seed(0)
            x = torch.randn(1, 3, pixels, pixels)
            rows.append(measured(name, x, repeats, Path(folder)))
    show(console, "Cost of verification, processor seconds", rows)
    if options.out is not None:
        save(options.out, "verify_cost", rows)
    return 0 if all(row["named"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
