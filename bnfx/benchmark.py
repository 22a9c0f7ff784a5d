"""Latency of ONNX files, measured side by side in one run.

With a baseline, the arms are {file, baseline} x {onnxruntime's BatchNorm fusions on, off} and a
floor, the baseline with every BatchNorm dropped: so the table shows what folding adds to what
onnxruntime does by itself, and what there is to gain at most.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
from rich.console import RenderableType
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.errors import BnfxError, ProviderError, VerificationError
from bnfx.onnx_files.reading import read_onnx
from bnfx.reports.document import Facts, Headline, Picture, Section, blocks
from bnfx.reports.drawing import Bar, bars, said
from bnfx.reports.report import Report, table
from bnfx.runtime.assignment import open_placed
from bnfx.runtime.canary import require_arithmetic
from bnfx.runtime.devices import device_name
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.providers import CPU, Where
from bnfx.runtime.runner import Request
from bnfx.runtime.sessions import SessionSettings, require_still_on, runtime_errors
from bnfx.runtime.values import empty_value, ort_value
from bnfx.verification.file_reference import file_precision
from bnfx.verification.references import Precision, arrays
from bnfx.verification.samples import as_sample
from bnfx.workspace import workspace

Fusions = Literal["on", "off", "both"]

_GRAPHS = "enable_cuda_graph"
_PATIENCE = 300.0  # seconds for a single run; one that takes longer is no latency to measure

#: onnxruntime's optimisers that fold a BatchNorm, or hide it in a blocked convolution.
BN_FUSIONS = "ConvBNFusion;MatMul_BatchNormalization_Fusion;NchwcTransformer"


@dataclass(frozen=True)
class Latency:
    """Seconds of one run of a file, over all runs."""

    #: "file", "baseline", "floor" or another file's; ", fusions off" where onnxruntime leaves
    #: BatchNorms alone.
    arm: str
    path: str
    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    #: The slowest run.
    peak: float
    #: (upper_quartile - lower_quartile) / median.
    spread: float

    def bar(self) -> Bar:
        """It as drawn, in milliseconds."""
        kind = (
            "main" if self.arm.startswith("file") else "quiet" if self.arm == "floor" else "other"
        )
        ends = (1e3 * self.lower_quartile, 1e3 * self.upper_quartile)
        return Bar(self.arm, 1e3 * self.median, *ends, _ms(self.median), kind)


@dataclass(frozen=True)
class BenchReport(Report):
    """Latencies from one interleaved run."""

    #: The file, the baseline if there is one, both without onnxruntime's BatchNorm fusions, the
    #: floor.
    arms: tuple[Latency, ...]
    #: Median of the file over median of the baseline; None without a baseline.
    ratio: float | None
    provider: str
    #: Timed runs of each arm.
    num_runs: int
    #: Threads of one operator on the CPU; 0 is onnxruntime's choice.
    num_threads: int
    #: What was left out, and why.
    notes: tuple[str, ...] = ()
    #: What it ran on, such as "NVIDIA H200"; "" where nothing tells.
    device: str = ""
    #: The coarsest arithmetic of a layer, by a canary, such as "float32" or "TF32".
    arithmetic: str = "float32"

    def headline(self) -> Headline:
        """How long a run takes, to the baseline where there is one."""
        first = self.arms[0]
        facts: Facts = (
            ("median", _ms(first.median)),
            ("provider", self.provider),
            ("device", self.device or "unknown"),
            ("arithmetic", self.arithmetic),
            ("runs of each arm", str(self.num_runs)),
            ("threads", str(self.num_threads or "onnxruntime's choice")),
        )
        verdict = f"{first.path} takes {_ms(first.median)}."
        if self.ratio is not None:
            verdict = f"{first.path} {self._change()}."
        return Headline("bnfx: benchmark", "neutral", verdict, facts)

    def _change(self) -> str:
        """How the file compares with the baseline, in words."""
        assert self.ratio is not None
        file, base = self.arms[:2]
        if (
            file.lower_quartile <= base.upper_quartile
            and base.lower_quartile <= file.upper_quartile
        ):
            return "takes as long as the baseline: no difference within the spread"
        words = "less" if self.ratio < 1 else "more"
        return f"takes {abs(1 - self.ratio):.1%} {words} time than the baseline"

    def sections(self) -> Iterator[Section]:
        """The table below a picture of the latencies."""
        rows = [arm.bar() for arm in self.arms]
        title = "Latency: median, and the middle half of the runs"
        picture = Picture(title, said(rows), bars(title, said(rows), rows, "ms"))
        yield Section("Latency", (picture, *blocks(self)))

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
        place = ", ".join(filter(None, (self.provider, self.device, self.arithmetic)))
        title = f"benchmark_onnx: {place}, {self.num_runs} runs each, interleaved{ratio}"
        title += "".join(f"\n{note}" for note in self.notes)
        columns = ("arm", "file", "median ms", "25 %", "75 %", "slowest", f"to {base.arm}")
        return table(title, columns, rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def benchmark_onnx(
    f: str | os.PathLike[str],
    args: Any,
    *,
    baseline: str | os.PathLike[str] | None = None,
    others: Mapping[str, str | os.PathLike[str]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    provider: str = "cpu",
    provider_options: Mapping[str, Any] | None = None,
    allow_on_cpu: Sequence[str] | None = None,
    precision: Precision = "fp32",
    num_runs: int = 100,
    warmup: int = 20,
    num_threads: int = 1,
    bn_fusions: Fusions | None = None,
    floor: bool | None = None,
    isolate: bool = True,
) -> BenchReport:
    """Measure a file, and a baseline in turns with it, with inputs and outputs on the device.

    Args:
        f: The ONNX file.
        args: Tuple of positional arguments, or a lone tensor.
        baseline: Another file with the same inputs, such as the unfolded model.
        others: Name of an arm -> further file with the same inputs, such as other options of
            folding.
        kwargs: Keyword arguments.
        provider: "cpu", "cuda", "cuda:1" or another, as in `verify_onnx`; it never falls back.
        provider_options: Options of the provider, as in `verify_onnx`.
        allow_on_cpu: Operators that may run on the CPU all the same, as in `verify_onnx`.
        precision: What the provider may compute in, "fp32" or "tf32"; a file in float16 or bfloat16
            is measured in that.
        num_runs: Timed runs of each arm, at least 50.
        warmup: Runs of each arm before.
        num_threads: Threads of one operator on the CPU; 0 lets onnxruntime choose.
        bn_fusions: onnxruntime's BatchNorm fusions "on", "off", or "both" as arms of their own;
            None means "both" with a baseline and "on" without.
        floor: Whether to measure the baseline with every BatchNorm dropped too (its outputs are
            wrong, its latency is the least that folding can reach); None means with a baseline.
        isolate: Whether each file first runs once in a process of its own, which survives what a
            file may do to it.

    Raises:
        ProviderError: The provider did not run the graph.
        VerificationError: A file cannot be read or run.
        BnfxError: Too few runs.
    """
    if num_runs < 50:
        raise BnfxError(f"num_runs={num_runs} is too few for a median and a spread; use 50 or more")
    fusions = bn_fusions or ("on" if baseline is None else "both")
    where = Where.of(provider, provider_options, allow_on_cpu)
    # A graph is captured from values that stay on the device, which those of one run do not.
    plain = replace(where, options={k: v for k, v in where.options.items() if k != _GRAPHS})
    sample = as_sample(args, kwargs)
    leaves = pytree.tree_leaves((sample.args, dict(sample.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    notes: list[str] = []
    with workspace() as folder:
        plan = _plan(Path(f), None if baseline is None else Path(baseline), fusions)
        if baseline is not None if floor is None else floor:
            dropped, count = _write_floor(Path(baseline or f), folder)
            notes += [] if count else ["floor: the baseline has no BatchNorm to drop"]
            plan.append(("floor", dropped, fusions != "off"))
        plan += [(name, Path(file), fusions != "off") for name, file in (others or {}).items()]
        precision = file_precision(read_onnx(Path(f)), precision)
        for _, path, on in plan:
            if isolate and (on or fusions == "off"):
                _try_apart(path, tensors, plain, precision)
        arithmetic = _arithmetic(plain, precision)
        how = SessionSettings(num_threads=num_threads, tf32=precision != "fp32", spin=True)
        arms = [
            _Arm(path, tensors, where, replace(how, without="" if on else BN_FUSIONS))
            for _, path, on in plan
        ]
        times = _measure(arms, num_runs, warmup)
    latencies = tuple(_summary(plan[i][0], plan[i][1], times[i]) for i in range(len(plan)))
    ratio = latencies[0].median / latencies[1].median if baseline is not None else None
    if not where.on_cpu and where.memory[0] == "cpu":
        notes.append("inputs and outputs lie in the memory of the CPU")
    return BenchReport(
        arms=latencies,
        ratio=ratio,
        provider=provider,
        num_runs=num_runs,
        num_threads=num_threads,
        notes=tuple(notes),
        device=device_name(where),
        arithmetic=arithmetic,
    )


def _arithmetic(where: Where, precision: Precision) -> str:
    """What this process computes in: a variable of the environment may have changed it."""
    if precision in ("fp16", "bf16"):
        return {"fp16": "float16", "bf16": "bfloat16"}[precision]
    return "float32" if where.on_cpu else require_arithmetic(where, precision).coarsest


def _try_apart(path: Path, tensors: list[Tensor], where: Where, precision: Precision) -> None:
    """Run a file once in a process of its own: it must not take this one down, nor hold it up."""
    proto = read_onnx(path)
    stored = {tensor.name for tensor in proto.graph.initializer}
    names = tuple(value.name for value in proto.graph.input if value.name not in stored)
    if len(names) != len(tensors):
        raise VerificationError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), the example has "
            f"{len(tensors)} tensors; give one for each"
        )
    with workspace() as folder:
        request = Request(
            model=str(path),
            provider=where.provider,
            folder=str(folder),
            names=names,
            runs=1,
            provider_options=where.options,
            allow_on_cpu=where.allow_on_cpu,
            precision=precision,
        )
        answer = execute_apart(request, [arrays(tensors)], timeout=_PATIENCE)
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


def _write_floor(f: Path, folder: Path) -> tuple[Path, int]:
    """Write `f` without its BatchNormalization nodes into `folder`: the file, and how many went.

    What read the result of a BatchNormalization reads its input instead. The outputs are wrong;
    the latency is the least that folding can reach.

    Raises:
        VerificationError: The file cannot be read.
    """
    model = read_onnx(f)
    onnx.load_external_data_for_model(model, str(f.parent))
    count = _drop(model.graph)
    count += sum(_drop_nodes(function.node, {*function.output}) for function in model.functions)
    written = folder / "floor.onnx"
    large = sum(len(t.raw_data) for t in model.graph.initializer) > 1_500_000_000
    onnx.save(model, str(written), save_as_external_data=large, location="floor.data")
    return written, count


def _drop(graph: onnx.GraphProto) -> int:
    count = _drop_nodes(graph.node, {value.name for value in graph.output})
    inner = [a for node in graph.node for a in node.attribute]
    return count + sum(_drop(g) for a in inner for g in (a.g, *a.graphs) if g.node)


def _drop_nodes(nodes: list[onnx.NodeProto], outputs: set[str]) -> int:
    """Of one graph: an output of the graph keeps its name by an Identity."""
    instead: dict[str, str] = {}
    kept = []
    count = 0
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
        if node.op_type != "BatchNormalization":
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        count += 1
        instead[node.output[0]] = node.input[0]
        if node.output[0] in outputs:
            kept.append(onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]]))
    del nodes[:]
    nodes.extend(kept)
    return count


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
        self, path: Path, tensors: list[Tensor], where: Where, settings: SessionSettings
    ) -> None:
        self.session = open_placed(str(path), where, settings).session
        self.name, self.path = where.name, str(path)
        memory, index = where.memory
        self.binding = self.session.io_binding()
        inputs = self.session.get_inputs()
        for value, array in zip(inputs, arrays(tensors), strict=True):
            bound = ort_value(array, value.type, (memory, index))
            self.binding.bind_ortvalue_input(value.name, bound)
        for value in self.session.get_outputs():
            if _GRAPHS not in where.options:
                self.binding.bind_output(value.name, memory, index)
                continue
            # A captured graph writes to where it was captured, again and again.
            kept = empty_value(value.shape, value.type, (memory, index))
            self.binding.bind_ortvalue_output(value.name, kept)
        self.binding.synchronize_inputs()

    def run(self) -> float:
        """Seconds of one run.

        Raises:
            VerificationError: onnxruntime fails on the CPU.
            ProviderError: It fails on another provider, or has left it.
        """
        start = time.perf_counter()
        try:
            self.session.run_with_iobinding(self.binding)
            self.binding.synchronize_outputs()
        except runtime_errors() as error:
            kind = VerificationError if self.name == CPU else ProviderError
            raise kind(f"{self.name} failed on {self.path}: {error}") from error
        end = time.perf_counter()
        require_still_on(self.session, self.name, self.path)
        return end - start
