"""Who removed which BatchNorm: bnfx, torch's exporter, onnxruntime at one of its levels, or nobody.

The exporter folds some BatchNorms itself, onnxruntime folds more when it loads the file, and on the
CPU its full level writes the rest as blocked depthwise convolutions. So "none left in the file"
proves nothing: the evaluations are counted at every stage.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.console import Group, RenderableType
from torch import nn

from bnfx.errors import VerificationError
from bnfx.inspection import BatchNormNode, inspect_onnx
from bnfx.onnx_files.reading import all_nodes, read_onnx
from bnfx.reports.document import Block, Headline, Picture, Section, blocks
from bnfx.reports.drawing import Bar, bars, said
from bnfx.reports.report import FoldRecord, FoldReport, Report, table, tally
from bnfx.runtime.isolated import load_apart
from bnfx.runtime.sessions import load_onnxruntime, runtime_errors
from bnfx.verification.staging import stage
from bnfx.workspace import workspace

BNFX, EXPORTER = "bnfx", "exporter"
#: onnxruntime's levels of optimisation, in the order in which it applies them.
LEVELS = {
    "onnxruntime basic": "ORT_ENABLE_BASIC",
    "onnxruntime extended": "ORT_ENABLE_EXTENDED",
    "onnxruntime full": "ORT_ENABLE_ALL",
}


@dataclass(frozen=True)
class StageRecord:
    """What became of one BatchNorm evaluation on its way into onnxruntime."""

    #: Module path of the BatchNorm, or the node's name where only a file is known.
    path: str
    #: "bnfx", "exporter", "onnxruntime basic", "onnxruntime extended" or "onnxruntime full"; None
    #: where it runs as a BatchNorm.
    removed_by: str | None
    #: Layers that carry it now, where bnfx removed it.
    into: tuple[str, ...]
    #: Why bnfx left it; what the stage did with it.
    reason: str


@dataclass(frozen=True)
class StageReport(Report):
    """One record for every BatchNorm evaluation of the source, and the count after each stage."""

    #: In execution order.
    batch_norms: tuple[StageRecord, ...]
    #: Stage -> BatchNorms left after it, from "source" to "onnxruntime full".
    left: Mapping[str, int]

    def headline(self) -> Headline:
        """Who removed how many."""
        count = len(self.batch_norms)
        verdict = f"{count} BatchNorms, removed by: {self._counts()}." if count else ""
        verdict = verdict or "There is no BatchNorm in it."
        return Headline("bnfx: ledger", "neutral", verdict)

    def sections(self) -> Iterator[Section]:
        """The table below a picture of what is left after each stage."""
        rows = [Bar(stage, n, n, n, str(n), "main") for stage, n in self.left.items()]
        title = "BatchNorms left after each stage"
        picture = Picture(title, said(rows), bars(title, said(rows), rows, "BatchNorms"))
        shown: tuple[Block, ...] = (picture,) if rows else ()
        yield Section("Who removed which BatchNorm", (*shown, *blocks(self)))

    def _counts(self) -> str:
        return tally(bn.removed_by or "nobody" for bn in self.batch_norms)

    def __rich__(self) -> RenderableType:
        return self._drawn(self.batch_norms)

    def rest(self) -> RenderableType:
        """The same with rows for those alone that bnfx did not remove."""
        return self._drawn([bn for bn in self.batch_norms if bn.removed_by != BNFX])

    def _drawn(self, records: Sequence[StageRecord]) -> RenderableType:
        if not self.batch_norms:
            return Group()
        left = " -> ".join(f"{stage} {n}" for stage, n in self.left.items())
        rows = (
            (bn.path, bn.removed_by or "nobody", ", ".join(bn.into) or "-", bn.reason or "-")
            for bn in records
        )
        title = f"removed by: {self._counts()}\nleft after, on the CPU: {left}"
        return table(title, ("BatchNorm", "removed by", "into", "reason"), rows)


def removal_ledger(
    model: nn.Module | None,
    args: Any = None,
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    fold_options: Mapping[str, Any] | None = None,
) -> StageReport:
    """Say for every BatchNorm evaluation which stage removed it, or why it stays.

    Args:
        model: The unfolded source; None where there is only a file, whose BatchNormalization nodes
            are then the source.
        args: Example inputs of `model`.
        f: The file made from `model`; without one, `model` is folded and exported for the count.
        kwargs: Example keyword arguments of `model`.
        fold_options: Options of `fold_bn`, such as `{"merge_branches": False}`.

    Raises:
        VerificationError: The file cannot be read, or onnxruntime cannot load it.
        CaptureError, ExportError: `model` cannot be folded or exported.
    """
    if model is None:
        if f is None:
            raise VerificationError("removal_ledger needs a model, a file or both")
        return _of_file(Path(f))
    from bnfx.export import export_onnx
    from bnfx.folding import fold_bn
    from bnfx.reports.report import report

    folded = fold_bn(model, args, example_kwargs=kwargs, **(fold_options or {}))
    plan = report(folded)
    assert isinstance(plan, FoldReport)
    if f is not None:
        return ledger_of(plan, Path(f))
    with workspace() as folder:
        written = folder / "model.onnx"
        export_onnx(folded, args, written, kwargs=kwargs)
        return ledger_of(plan, written)


def ledger_of(plan: FoldReport, f: Path) -> StageReport:
    """The ledger of a model folded as `plan` says and written to `f`."""
    waiting: dict[str, list[BatchNormNode]] = defaultdict(list)
    for node in inspect_onnx(f).batch_norms:
        waiting[node.module].append(node)
    stages = runtime_batch_norms(f)
    records = [_follow(bn, waiting, stages) for bn in plan.batch_norms]
    left = {"source": len(records), BNFX: sum(bn.verdict == "kept" for bn in plan.batch_norms)}
    return StageReport(tuple(records), _counts(records, left, stages))


def ledger_of_file(records: Sequence[FoldRecord], f: Path) -> StageReport:
    """The ledger of a file that `fold_onnx` wrote to `f`; nobody exported it."""
    waiting: dict[str, list[BatchNormNode]] = defaultdict(list)
    for node in inspect_onnx(f).batch_norms:
        waiting[node.node or node.output].append(node)
    stages = runtime_batch_norms(f)
    found = tuple(_follow(bn, waiting, stages) for bn in records)
    left = {"source": len(found), BNFX: sum(bn.removed_by != BNFX for bn in found)}
    return StageReport(found, left | {stage: len(names) for stage, names in stages.items()})


def _of_file(f: Path) -> StageReport:
    nodes = inspect_onnx(f).batch_norms
    stages = runtime_batch_norms(f)
    records = []
    for node in nodes:
        stage, reason = _runtime_stage(node, stages)
        records.append(StageRecord(node.module or node.node or node.output, stage, (), reason))
    return StageReport(tuple(records), _counts(records, {"source": len(records)}, stages))


def _counts(
    records: list[StageRecord], left: dict[str, int], stages: Mapping[str, frozenset[str]]
) -> dict[str, int]:
    if BNFX in left:
        left[EXPORTER] = left[BNFX] - sum(bn.removed_by == EXPORTER for bn in records)
    return left | {stage: len(names) for stage, names in stages.items()}


def _follow(
    bn: FoldRecord,
    waiting: dict[str, list[BatchNormNode]],
    stages: Mapping[str, frozenset[str]],
) -> StageRecord:
    if bn.verdict != "kept":
        return StageRecord(bn.path, BNFX, bn.into, bn.reason)
    if not waiting[bn.path]:
        return StageRecord(bn.path, EXPORTER, (), f"bnfx left it: {bn.reason}")
    stage, reason = _runtime_stage(waiting[bn.path].pop(0), stages)
    return StageRecord(bn.path, stage, (), "; ".join(filter(None, (bn.reason, reason))))


def _runtime_stage(
    node: BatchNormNode, stages: Mapping[str, frozenset[str]]
) -> tuple[str | None, str]:
    for level, names in stages.items():
        if node.output not in names:
            blocked = level == "onnxruntime full"
            return level, "it runs as a blocked depthwise convolution" if blocked else ""
    return None, "" if stages else "onnxruntime is not installed"


def runtime_batch_norms(f: Path) -> dict[str, frozenset[str]]:
    """By onnxruntime's level, outputs of the BatchNormalizations that are left at it.

    The levels are applied by onnxruntime on the CPU, and the optimised graph is read back.

    Raises:
        VerificationError: onnxruntime cannot load the file.
    """
    ort = load_onnxruntime()
    found = {}
    with workspace() as folder:
        # A copy in float32 stands for a file in bfloat16, which the CPU cannot load.
        model = stage(read_onnx(f), f, folder, on_cpu=True, values=False).model
        load_apart(Path(model))
        for name, level in LEVELS.items():
            written = folder / f"{level}.onnx"
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
            options.optimized_model_filepath = str(written)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{level}.data"
            )
            try:
                ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            except runtime_errors() as error:
                raise VerificationError(f"onnxruntime cannot load {f}: {error}") from error
            found[name] = _names(onnx.load(str(written), load_external_data=False))
    return found


def _names(model: onnx.ModelProto) -> frozenset[str]:
    norms = [node for node in all_nodes(model) if node.op_type == "BatchNormalization"]
    return frozenset(node.output[0] for node in norms)
