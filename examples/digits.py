"""The main job on real data: insert BatchNorm, train, fold, export to ONNX, verify, measure.

Two networks learn scikit-learn's handwritten digits, each with and without BatchNorm, from the same
initial weights, on the same batches, with the same plain SGD. `make demo` runs this. The exit code
is 1 if a file was not verified, or if torch and onnxruntime read a test image differently.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from demo_page import DemoReport
from networks import ConvNet, sigmoid_mlp
from pictures import draw_curves
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from training import BATCH, Images, Run, load, predict, share, train

import bnfx
from bnfx.reports.report import Report

DYNAMIC_BATCH = ({0: "batch"},)


@dataclass(frozen=True)
class Job:
    """One network and how it is trained."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    lr: float
    steps: int
    quick_steps: int


JOBS = (
    Job("mlp", "Sigmoid MLP, six hidden layers", sigmoid_mlp, 0.3, 1500, 200),
    Job("convnet", "Convolutional network", ConvNet, 0.1, 600, 40),
)


@dataclass(frozen=True)
class Deployed:
    """What came out of one network."""

    job: Job
    provider: str
    plain: Run
    with_bn: Run
    labels: dict[str, Tensor]
    accuracy: dict[str, float]
    insert: Report
    fold: Report
    verified: bnfx.VerifyReport
    latency: bnfx.BenchReport

    def images_that_differ(self) -> int:
        """How many test images torch and onnxruntime read differently."""
        ours, theirs = self.labels["torch, with BatchNorm"], self.labels["onnxruntime, folded"]
        return int((ours != theirs).sum())

    def good(self) -> bool:
        """Verified, and torch and onnxruntime read every test image alike."""
        return bool(self.verified) and self.images_that_differ() == 0

    def to_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        reports = {"insert": self.insert, "fold": self.fold, "verify": self.verified}
        return {
            "network": self.job.title,
            "provider": self.provider,
            "sgd": {"lr": self.job.lr, "batch": BATCH, "steps": self.with_bn.steps[-1]},
            "test_accuracy": self.accuracy,
            "test_images_that_torch_and_onnxruntime_read_differently": self.images_that_differ(),
            **{name: report.to_dict() for name, report in reports.items()},
            "latency": self.latency.to_dict(),
            "curves": {
                arm: {"step": run.steps, "test_accuracy": run.accuracy}
                for arm, run in (("without_bn", self.plain), ("with_bn", self.with_bn))
            },
        }


def train_both(job: Job, data: Images, steps: int, console: Console) -> tuple[Run, Run]:
    """The network as it is, and with BatchNorm inserted."""
    plain = job.build()
    with_bn = bnfx.insert_bn(plain, data.train_images[:BATCH])
    console.print(bnfx.report(with_bn))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    runs = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for model, arm in ((plain, "without BatchNorm"), (with_bn, "with BatchNorm")):
            task = progress.add_task(f"training {arm:18}", total=steps)
            tick = partial(progress.advance, task)
            runs.append(train(model, data, lr=job.lr, steps=steps, tick=tick))
    return runs[0], runs[1]


def onnx_predict(f: Path, images: Tensor, provider: str) -> Tensor:
    """Labels that onnxruntime predicts, in float32 (its CUDA provider would use TF32)."""
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
    session = ort.InferenceSession(
        f, providers=[cuda] if provider == "cuda" else ["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(np.asarray(logits)).argmax(1)


def export_unfolded(model: nn.Module, args: tuple[Tensor], f: Path) -> None:
    """The network as it was trained, BatchNorm and all, to measure against.

    `optimize=False`, because the optimizer of torch's exporter folds these BatchNorms too.
    """
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch, about torch
        program = torch.onnx.export(
            model, args, dynamic_shapes=DYNAMIC_BATCH, optimize=False, verbose=False
        )
    assert program is not None
    program.save(f)


def verify(
    model: nn.Module, f: Path, args: tuple[Tensor], console: Console
) -> tuple[str, bnfx.VerifyReport]:
    """On CUDA where onnxruntime runs there, on the CPU otherwise; the provider and the report."""
    try:
        return "cuda", bnfx.verify_onnx(model, f, args, provider="cuda")
    except bnfx.ProviderError as why:
        console.print(f"Not on CUDA: {str(why).partition('; ')[0]}", markup=False, style="dim")
    return "cpu", bnfx.verify_onnx(model, f, args, provider="cpu")


def deploy(job: Job, runs: tuple[Run, Run], data: Images, out: Path, console: Console) -> Deployed:
    """Fold, export, verify against the unfolded network, and measure."""
    plain, trained = (run.model for run in runs)
    folded = bnfx.fold_bn(trained)
    console.print(bnfx.report(folded))
    f, unfolded_f = out / f"{job.name}.onnx", out / f"{job.name}-unfolded.onnx"
    args = (data.test_images[:8],)
    bnfx.export_onnx(folded, args, f, dynamic_shapes=DYNAMIC_BATCH)
    export_unfolded(trained, args, unfolded_f)
    provider, verified = verify(trained, f, args, console)
    console.print(verified)
    latency = bnfx.benchmark_onnx(f, args, baseline=unfolded_f, provider=provider)
    console.print(latency)
    labels = {
        "torch, without BatchNorm": predict(plain, data.test_images),
        "torch, with BatchNorm": predict(trained, data.test_images),
        "torch, folded": predict(folded, data.test_images),
        "onnxruntime, folded": onnx_predict(f, data.test_images, provider),
    }
    return Deployed(
        job=job,
        provider=provider,
        plain=runs[0],
        with_bn=runs[1],
        labels=labels,
        accuracy={stage: share(seen, data.test_labels) for stage, seen in labels.items()},
        insert=bnfx.report(trained),
        fold=bnfx.report(folded),
        verified=verified,
        latency=latency,
    )


def accuracy_table(results: list[Deployed]) -> Table:
    """Test accuracy of every stage, in percent, one column for each network."""
    table = Table(title="Accuracy on the same 360 test images (%)", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.job.title, justify="right")
    for stage in results[0].accuracy:
        table.add_row(stage, *(f"{100 * result.accuracy[stage]:.2f}" for result in results))
    return table


def write(results: list[Deployed], out: Path, seed: int) -> None:
    """The JSON report, the picture, and the page that has it all."""
    packages = ("bnfx", "torch", "onnx", "onnxscript", "scikit-learn")
    report = {
        "seed": seed,
        "versions": {**{p: metadata.version(p) for p in packages}, "onnxruntime": ort.__version__},
        "networks": {result.job.name: result.to_dict() for result in results},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    panels = [
        (r.job.title, f"plain SGD, learning rate {r.job.lr} falling to 0", r.plain, r.with_bn)
        for r in results
    ]
    draw_curves(panels, out / "training.png")
    page = DemoReport(
        good=all(result.good() for result in results),
        facts=tuple((r.job.title, f"{r.verified.status} on {r.provider}") for r in results),
        accuracy=accuracy_table(results),
        curves=out / "training.png",
        networks={r.job.title: (r.insert, r.fold, r.verified, r.latency) for r in results},
    )
    page.write(out / "index.html")


def show_results(results: list[Deployed], out: Path, console: Console) -> None:
    """The accuracies, one verdict for each network, and the files."""
    console.rule("Results")
    console.print(accuracy_table(results))
    for result in results:
        where = "CUDA" if result.provider == "cuda" else "CPU"
        verdict = f"{result.verified.status} on {where}"
        differ = result.images_that_differ()
        alike = f"torch and onnxruntime read {differ or 'no'} test images differently"
        console.print(f"{result.job.title}: verification {verdict}; {alike}", markup=False)
    console.print(
        "Latency: the unfolded files keep their BatchNorm nodes, by torch.onnx.export with "
        "optimize=False. Its default folds the BatchNorms of these two networks as well.",
        style="dim",
    )
    names = ", ".join(sorted(path.name for path in out.iterdir() if path.is_file()))
    console.print(f"\nIn {out}: {names}", markup=False, highlight=False)
    console.print(f"Open {(out / 'index.html').resolve().as_uri()}", markup=False)


def main(argv: list[str]) -> int:
    """Run the job; 0 where every file is verified and read alike."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the initial weights")
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # faster for networks this small, and on a busy machine far faster
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    data = load(options.seed)
    results = []
    for job in JOBS:
        console.rule(job.title)
        torch.manual_seed(options.seed)
        runs = train_both(job, data, job.quick_steps if options.quick else job.steps, console)
        results.append(deploy(job, runs, data, options.out, console))
    write(results, options.out, options.seed)
    show_results(results, options.out, console)
    return 0 if all(result.good() for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
