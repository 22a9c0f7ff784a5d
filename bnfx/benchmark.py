"""Latency of ONNX files, measured side by side in one run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.errors import BnfxError
from bnfx.providers import load_onnxruntime, open_session, require_provider
from bnfx.reports import Report, table

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Latency:
    """Seconds of one run of a file: median and quartiles over the runs."""

    path: str
    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class BenchReport(Report):
    """Latencies from one interleaved run.

    Attributes:
        arms: The file, then the baseline if there is one.
        ratio: Median of the file over median of the baseline; None without a baseline.
        provider: Where all of it ran.
        num_runs: Timed runs of each arm.
        num_threads: Threads of one operator on the CPU; 0 is onnxruntime's choice.
    """

    arms: tuple[Latency, ...]
    ratio: float | None
    provider: str
    num_runs: int
    num_threads: int

    def __rich__(self) -> RenderableType:
        rows = [
            (
                arm.path,
                *(f"{1e3 * t:.4f}" for t in (arm.median, arm.lower_quartile, arm.upper_quartile)),
            )
            for arm in self.arms
        ]
        ratio = "" if self.ratio is None else f", ratio {self.ratio:.3f}"
        title = f"benchmark_onnx: {self.provider}, {self.num_runs} runs each, interleaved{ratio}"
        return table(title, ("file", "median ms", "25 %", "75 %"), rows)


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
) -> BenchReport:
    """Measure a file, and a baseline in turns with it, with inputs and outputs on the device.

    Args:
        f: The ONNX file.
        args: Tuple of positional arguments, or a lone tensor.
        baseline: Another file with the same inputs.
        kwargs: Keyword arguments.
        provider: "cpu", "cuda" or "cuda:1"; CUDA never falls back.
        num_runs: Timed runs of each file, at least 50.
        warmup: Runs of each file before.
        num_threads: Threads of one operator on the CPU; 0 lets onnxruntime choose.

    Raises:
        ProviderError: The provider did not run the graph.
        BnfxError: Too few runs.
    """
    if num_runs < 50:
        raise BnfxError(f"num_runs={num_runs} is too few for a median and a spread; use 50 or more")
    files = [Path(f), *([Path(baseline)] if baseline is not None else [])]
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    leaves = pytree.tree_leaves((positional, dict(kwargs or {})))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    arms = [_Arm(path, tensors, provider, num_threads) for path in files]
    for _ in range(warmup):
        for arm in arms:
            arm.run()
    times: list[list[float]] = [[] for _ in arms]
    for i in range(num_runs):
        # Each arm goes first every other time, so that neither always finds a warm cache.
        for k in range(len(arms)):
            which = (i + k) % len(arms)
            times[which].append(arms[which].run())
    latencies = [_summary(path, seconds) for path, seconds in zip(files, times, strict=True)]
    ratio = latencies[0].median / latencies[1].median if len(latencies) == 2 else None
    return BenchReport(tuple(latencies), ratio, provider, num_runs, num_threads)


def _summary(path: Path, seconds: list[float]) -> Latency:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return Latency(str(path), median, lower, upper)


class _Arm:
    """One file with its inputs bound on the device."""

    def __init__(self, path: Path, tensors: list[Tensor], provider: str, num_threads: int) -> None:
        self.session = open_session(path, provider, num_threads=num_threads)
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
