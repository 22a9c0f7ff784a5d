"""Latency of ONNX files, measured side by side in one run.

With a baseline, the arms are {file, baseline} x {onnxruntime's BatchNorm fusions on, off} and a
floor, the baseline with every BatchNorm dropped: so the table shows what folding adds to what
onnxruntime does by itself, and what there is to gain at most.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.errors import BnfxError, VerificationError
from bnfx.floor import write_floor
from bnfx.onnx_files.reading import read_onnx
from bnfx.reports.report import Report, table
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.runner import Request
from bnfx.runtime.sessions import SessionSettings, load_onnxruntime, open_session, require_provider
from bnfx.verification.samples import as_sample

if TYPE_CHECKING:
    from rich.console import RenderableType

Fusions = Literal["on", "off", "both"]

_PATIENCE = 300.0  # seconds for a single run; one that takes longer is no latency to measure

#: onnxruntime's optimisers that fold a BatchNorm, or hide it in a blocked convolution.
BN_FUSIONS = "ConvBNFusion;MatMul_BatchNormalization_Fusion;NchwcTransformer"


@dataclass(frozen=True)
class Latency:
    """Seconds of one run of a file, over all runs.

    Attributes:
        arm: "file", "baseline" or "floor", with ", fusions off" where onnxruntime leaves
            BatchNorms alone.
        path: The file.
        median: Median.
        lower_quartile: A quarter of the runs were faster.
        upper_quartile: A quarter of the runs were slower.
        fastest: Fastest run.
        peak: Slowest run.
        spread: (upper_quartile - lower_quartile) / median.
    """

    arm: str
    path: str
    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    peak: float
    spread: float


@dataclass(frozen=True)
class BenchReport(Report):
    """Latencies from one interleaved run.

    Attributes:
        arms: The file, the baseline if there is one, both without onnxruntime's BatchNorm fusions,
            the floor.
        ratio: Median of the file over median of the baseline; None without a baseline.
        provider: Where all of it ran.
        num_runs: Timed runs of each arm.
        num_threads: Threads of one operator on the CPU; 0 is onnxruntime's choice.
        notes: What was left out, and why.
    """

    arms: tuple[Latency, ...]
    ratio: float | None
    provider: str
    num_runs: int
    num_threads: int
    notes: tuple[str, ...] = ()

    def __rich__(self) -> RenderableType:
        base = next((arm for arm in self.arms if arm.arm == "baseline"), self.arms[0])
        rows = [
            (
                *(arm.arm, arm.path),
                *(f"{1e3 * t:.4f}" for t in (arm.median, arm.lower_quartile, arm.upper_quartile)),
                *(f"{1e3 * arm.peak:.4f}", f"{arm.median / base.median:.3f}"),
            )
            for arm in self.arms
        ]
        ratio = "" if self.ratio is None else f", ratio {self.ratio:.3f}"
        title = f"benchmark_onnx: {self.provider}, {self.num_runs} runs each, interleaved{ratio}"
        title += "".join(f"\n{note}" for note in self.notes)
        columns = ("arm", "file", "median ms", "25 %", "75 %", "slowest", f"to {base.arm}")
        return table(title, columns, rows)


def benchmark_onnx(
    f: str | os.PathLike[str],
    args: Any,
    *,
    baseline: str | os.PathLike[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    provider: str = "cpu",
    num_runs: int = 100,
    warmup: int = 20,
    num_threads: int = 1,
    bn_fusions: Fusions | None = None,
    floor: bool | None = None,
) -> BenchReport:
    """Measure a file, and a baseline in turns with it, with inputs and outputs on the device.

    Args:
        f: The ONNX file.
        args: Tuple of positional arguments, or a lone tensor.
        baseline: Another file with the same inputs, such as the unfolded model.
        kwargs: Keyword arguments.
        provider: "cpu", "cuda" or "cuda:1"; CUDA never falls back.
        num_runs: Timed runs of each arm, at least 50.
        warmup: Runs of each arm before.
        num_threads: Threads of one operator on the CPU; 0 lets onnxruntime choose.
        bn_fusions: onnxruntime's BatchNorm fusions "on", "off", or "both" as arms of their own;
            None means "both" with a baseline and "on" without.
        floor: Whether to measure the baseline with every BatchNorm dropped too (its outputs are
            wrong, its latency is the least that folding can reach); None means with a baseline.

    Raises:
        ProviderError: The provider did not run the graph.
        VerificationError: A file cannot be read or run.
        BnfxError: Too few runs.
    """
    if num_runs < 50:
        raise BnfxError(f"num_runs={num_runs} is too few for a median and a spread; use 50 or more")
    fusions = bn_fusions or ("on" if baseline is None else "both")
    sample = as_sample(args, kwargs)
    leaves = pytree.tree_leaves((sample.args, dict(sample.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bnfx-") as folder:
        plan = _plan(Path(f), None if baseline is None else Path(baseline), fusions)
        if baseline is not None if floor is None else floor:
            dropped, count = write_floor(Path(baseline or f), Path(folder))
            notes += [] if count else ["floor: the baseline has no BatchNorm to drop"]
            plan.append(("floor", dropped, fusions != "off"))
        for _, path, on in plan:
            if on or fusions == "off":
                _try_apart(path, tensors, provider)
        arms = [_Arm(path, tensors, provider, num_threads, on) for _, path, on in plan]
        times = _measure(arms, num_runs, warmup)
    latencies = tuple(_summary(plan[i][0], plan[i][1], times[i]) for i in range(len(plan)))
    ratio = latencies[0].median / latencies[1].median if baseline is not None else None
    return BenchReport(latencies, ratio, provider, num_runs, num_threads, tuple(notes))


def _try_apart(path: Path, tensors: list[Tensor], provider: str) -> None:
    """Run a file once in a process of its own: it must not take this one down, nor hold it up."""
    proto = read_onnx(path)
    stored = {tensor.name for tensor in proto.graph.initializer}
    names = tuple(value.name for value in proto.graph.input if value.name not in stored)
    if len(names) != len(tensors):
        raise VerificationError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), the example has "
            f"{len(tensors)} tensors"
        )
    with tempfile.TemporaryDirectory(prefix="bnfx-") as folder:
        request = Request(str(path), provider, folder, names, 1)
        feed = [tensor.detach().cpu().numpy() for tensor in tensors]
        answer = execute_apart(request, [feed], timeout=_PATIENCE)
    if answer.failures:
        raise VerificationError(f"onnxruntime cannot run {path}: {answer.failures[0]}")


def _plan(f: Path, baseline: Path | None, fusions: Fusions) -> list[tuple[str, Path, bool]]:
    """Name, file and whether onnxruntime may fuse BatchNorms, for each arm."""
    files = [("file", f), *([("baseline", baseline)] if baseline is not None else [])]
    plan = []
    for on in (True, False):
        if fusions not in ("both", "on" if on else "off"):
            continue
        plan += [(name if on else f"{name}, fusions off", path, on) for name, path in files]
    return plan


def _measure(arms: list[_Arm], num_runs: int, warmup: int) -> list[list[float]]:
    for _ in range(warmup):
        for arm in arms:
            arm.run()
    times: list[list[float]] = [[] for _ in arms]
    for i in range(num_runs):
        # Each arm goes first in its turn, so that none always finds a warm cache.
        for k in range(len(arms)):
            which = (i + k) % len(arms)
            times[which].append(arms[which].run())
    return times


def _summary(arm: str, path: Path, seconds: list[float]) -> Latency:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    spread = (upper - lower) / median
    return Latency(arm, str(path), median, lower, upper, min(seconds), max(seconds), spread)


class _Arm:
    """One file with its inputs bound on the device."""

    def __init__(
        self,
        path: Path,
        tensors: list[Tensor],
        provider: str,
        num_threads: int,
        fusions: bool,  # noqa: FBT001  # a private class with one caller
    ) -> None:
        without = "" if fusions else BN_FUSIONS
        settings = SessionSettings(num_threads=num_threads, without=without)
        self.session = open_session(path, provider, settings)
        require_provider(self.session, provider)
        kind, _, index = provider.partition(":")
        device = (kind, int(index or 0))
        self.binding = self.session.io_binding()
        ort = load_onnxruntime()
        for value, tensor in zip(self.session.get_inputs(), tensors, strict=True):
            bound = ort.OrtValue.ortvalue_from_numpy(tensor.detach().cpu().numpy(), *device)
            self.binding.bind_ortvalue_input(value.name, bound)
        for value in self.session.get_outputs():
            self.binding.bind_output(value.name, *device)
        self.binding.synchronize_inputs()

    def run(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return time.perf_counter() - start
