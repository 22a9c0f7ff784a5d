"""Prove that an ONNX file computes what the unfolded reference computes.

Three tiers. Weights: the reference is folded again in float64, and every weight that reaches a node
of the file is held against it. Layers: each on the input that the file gives it; they point at what
is wrong. Outputs: onnxruntime against the reference in float64, in units of the reference's own
error (see `bnfx.verification.outputs`). Nothing that the file claims about itself weakens a check.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from bnfx.errors import FoldError, VerificationError
from bnfx.gauges.walk import FoldOptions
from bnfx.graphs.brought import brought
from bnfx.graphs.examples import Example, training_modules
from bnfx.numbers import UNIT, Array
from bnfx.onnx_files.reading import FOLDED, OPTIONS, all_nodes, metadata_of, read_onnx, type_name
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.providers import Where
from bnfx.runtime.runner import Answer, Request, execute
from bnfx.verification.faults import output_fault
from bnfx.verification.file_reference import OnnxReference
from bnfx.verification.layer_checks import MAX_LAYER_RATIO
from bnfx.verification.outputs import SIGMOID, OutputCheck, check_output, resolution_of
from bnfx.verification.references import DTYPES, Precision, TorchReference, arrays
from bnfx.verification.samples import (
    RowTruths,
    Runs,
    as_sample,
    batch_of,
    other_batches,
    pool,
    resized,
    rows_of,
    symbolic_batch,
)
from bnfx.verification.staging import Staged, stage
from bnfx.verification.tiers import Findings, check_layers
from bnfx.verification.verdicts import Divergence, NodePlace, TierCheck, VerifyReport
from bnfx.verification.weight_checks import MAX_WEIGHT_RATIO, Rounding
from bnfx.workspace import workspace

Reference = TorchReference | OnnxReference


def verify_onnx(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    f: str | os.PathLike[str],
    args: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    provider: str = "cpu",
    provider_options: Mapping[str, Any] | None = None,
    allow_on_cpu: Sequence[str] | None = None,
    num_inputs: int = 8,
    inputs: Sequence[Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    precision: Precision = "fp32",
    max_ratio: float = 4.0,
    localize: bool = True,
    timeout: float | None = None,
    isolate: bool = True,
    exact: fx.GraphModule | None = None,
    rewritten: Collection[str] = (),
) -> VerifyReport:
    """Compare an ONNX file with the unfolded model that it was made from.

    Args:
        model: The unfolded reference, in eval mode; left bit-identical. Or an exported program,
            which brings its inputs. Or the path of another ONNX file, which is evaluated in
            float64.
        f: The ONNX file, written by anyone.
        args: Tuple of positional example arguments, or a lone tensor: shapes, dtypes and ranges of
            the inputs that are drawn. They are the first input themselves. Where the reference is
            a file they may be left out: its declared inputs are drawn.
        kwargs: Example keyword arguments.
        provider: "cpu", "cuda", "cuda:1", another one of onnxruntime by its short name, or by its
            full one; it never falls back.
        provider_options: Options of the provider, such as `{"device_type": "GPU"}`; `library` names
            the file of a provider that is a plugin.
        allow_on_cpu: Operators that may run on the CPU all the same, such as `("Shape",)`; None
            allows arithmetic of shapes alone.
        num_inputs: Inputs to pool the error over.
        inputs: Inputs to use instead of drawn ones, each like `args`.
        batch_sizes: Batch sizes to run besides that of `args`; by default 1, 2 and 7 where the
            file's batch is symbolic, none where it is fixed.
        precision: What the budget is taken from: the reference in "fp32", "tf32", "fp16" or "bf16".
            A model in a coarser dtype is held to that one.
        max_ratio: Limit of the error, in budgets.
        localize: Whether to compare layer by layer and to name the first thing that is wrong. The
            weights of a file whose weights are computed by nodes are compared only then.
        timeout: Seconds that onnxruntime gets; None takes 100 times what the reference took on one
            input, times the number of inputs, at least two minutes.
        isolate: Whether onnxruntime runs in a process of its own, which survives what a file may do
            to it. On another provider than the CPU it always does.
        exact: What `bnfx.folding.fold_exactly` made of `model`, unrounded, where the caller has it:
            it is the first form that weights are held against, and is not folded again.
        rewritten: Names of tensors in `f` to which folding gave values that `model` does not have:
            outputs decide there.

    Raises:
        VerificationError: The file cannot be read or loaded, has other inputs; the reference is in
            train mode, or has no one answer; an argument makes no sense.
        ProviderError: The provider did not run the graph, or not in the arithmetic asked for.
    """
    start = time.perf_counter()
    if precision not in tuple(DTYPES):
        raise VerificationError(f"precision={precision!r} is unknown; use {', '.join(DTYPES)}")
    if not isinstance(max_ratio, int | float) or not 0 <= max_ratio < math.inf:
        raise VerificationError(f"max_ratio={max_ratio!r} is no limit; use 4.0")
    where = Where.of(provider, provider_options, allow_on_cpu)
    if isinstance(model, ExportedProgram):
        given = brought(model, args, kwargs)
        model, args, kwargs = given.module, given.args, given.kwargs
    path = Path(f)
    proto = read_onnx(path)
    reference = _reference(
        model,
        precision,
        timeout,
        len(proto.graph.output),
        exact,
        _options_of(proto),
        isolate=isolate,
    )
    drawn = args is None and not kwargs and isinstance(reference, OnnxReference)
    if isinstance(reference, OnnxReference) and drawn:
        example = reference.example()
    else:
        example = as_sample(() if args is None else args, kwargs)
    names, values = _declared(proto)
    if len(names) != len(reference.leaves(example)):
        raise VerificationError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), the example has "
            f"{len(reference.leaves(example))} tensors; give one for each"
        )
    began = time.perf_counter()
    pooled, runs = pool(reference, example, inputs, num_inputs, drawn_too=drawn)
    each = (time.perf_counter() - began) / len(pooled)
    fixed = isinstance(reference, OnnxReference) and symbolic_batch(reference.inputs) is None
    sizes = () if fixed and batch_sizes is None else other_batches(values, example, batch_sizes)
    if batch_of(pooled[0]) == 0:
        raise VerificationError("the first input has a batch of 0, which verifies nothing")
    small = [resized(pooled, size) for size in sizes]
    plan = _Plan(path, proto, where, reference, pooled, small, sizes, names, values, rewritten)
    reference.require_one_answer(pooled[0], runs)
    limit = max(120.0, 100 * each * (len(pooled) + sum(sizes))) if timeout is None else timeout
    reference.release()  # while onnxruntime holds the weights too
    staged, answer = _run(plan, localize=localize, timeout=limit, isolate=isolate)
    rows = [rows_of(pooled, size) for size in sizes]
    runs += reference.run(small, RowTruths(runs, batch_of(pooled[0]), rows))
    if answer.proof.get("truncated"):
        runs = replace(runs, rounded=reference.truncated(plan.samples, runs))
    reference.release()
    outputs = _check_outputs(plan, answer, runs, max_ratio)
    findings = _check_layers(plan, staged, answer)
    return _report(plan, staged, answer, outputs, findings, max_ratio, localize, start)


def _reference(
    model: nn.Module | str | os.PathLike[str],
    precision: Precision,
    timeout: float | None,
    outputs: int,
    exact: fx.GraphModule | None,
    options: Mapping[str, bool | int],
    *,
    isolate: bool,
) -> Reference:
    if not isinstance(model, nn.Module | str | os.PathLike):
        raise VerificationError(
            f"the reference is a {type(model).__name__}; give a torch.nn.Module, an exported "
            "program, or the path of an ONNX file"
        )
    if not isinstance(model, nn.Module):
        return OnnxReference(Path(model), precision, timeout or 600.0, isolate=isolate)
    if found := training_modules(model):
        raise VerificationError(
            f"the reference is in train mode at {found[:8]}, so it has no one answer; call "
            "model.eval() first"
        )
    return TorchReference(model, precision, outputs, exact, options)


def _options_of(proto: onnx.ModelProto) -> dict[str, bool | int]:
    """Options of folding that the file names and that are not the usual ones.

    They weaken nothing: any form that they give is right.
    """
    usual = asdict(FoldOptions())
    try:
        told = json.loads(metadata_of(proto).get(OPTIONS, "{}"))
        named = {name: told[name] for name in usual if type(told[name]) is type(usual[name])}
        FoldOptions(**named)
    except (ValueError, TypeError, KeyError, FoldError):
        return {}
    return {name: value for name, value in named.items() if value != usual[name]}


@dataclass(frozen=True)
class _Plan:
    """What is compared with what, on which inputs."""

    path: Path
    proto: onnx.ModelProto
    where: Where
    reference: Reference
    pooled: list[Example]
    small: list[Example]
    sizes: tuple[int, ...]
    names: list[str]
    values: list[onnx.ValueInfoProto]
    rewritten: Collection[str]

    @property
    def samples(self) -> list[Example]:
        """Every input, the pooled ones first."""
        return [*self.pooled, *self.small]

    @property
    def shown(self) -> int:
        """Number of the input that layers are compared on: the smallest batch there is."""
        least = min(self.sizes, default=0)
        own = batch_of(self.pooled[0])
        smaller = least and own is not None and least < own
        return len(self.pooled) + self.sizes.index(least) if smaller else 0


def _declared(proto: onnx.ModelProto) -> tuple[list[str], list[onnx.ValueInfoProto]]:
    """The inputs that a caller must give."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    values = [value for value in proto.graph.input if value.name not in stored]
    return [value.name for value in values], values


def _run(plan: _Plan, *, localize: bool, timeout: float, isolate: bool) -> tuple[Staged, Answer]:
    with workspace() as folder:
        where = plan.where
        staged = stage(plan.proto, plan.path, folder, on_cpu=where.on_cpu, values=localize)
        request = Request(
            model=staged.model,
            provider=where.provider,
            provider_options=where.options,
            allow_on_cpu=where.allow_on_cpu,
            folder=str(folder),
            names=tuple(plan.names),
            runs=len(plan.samples),
            precision=plan.reference.precision,
            values_model=staged.values_model,
            values=staged.graph.wanted if localize else (),
            values_run=plan.shown,
            weights=staged.weights,
        )
        feeds = [_feed(plan, sample) for sample in plan.samples]
        if isolate or not where.on_cpu:
            return staged, execute_apart(request, feeds, timeout=timeout)
        return staged, execute(request, feeds)


def _feed(plan: _Plan, sample: Example) -> list[Array]:
    """The tensors of an input, floats in the dtype that the file takes."""
    feed = arrays(plan.reference.leaves(sample))
    wanted = [type_name(value.type.tensor_type.elem_type) for value in plan.values]
    return [
        array.astype(kind)
        if array.dtype.kind == "f" and kind in ("float16", "float32", "float64")
        else array
        for array, kind in zip(feed, wanted, strict=True)
    ]


def _check_outputs(plan: _Plan, answer: Answer, runs: Runs, max_ratio: float) -> list[OutputCheck]:
    unit = UNIT[plan.reference.precision]
    if len(answer.outputs) != len(runs.own[0]):
        reason = f"the file has {len(answer.outputs)} outputs, the model {len(runs.own[0])}"
        return [OutputCheck("outputs", (), "", math.inf, unit, math.inf, False, reason)]
    count = len(plan.pooled)
    groups = [range(count), *([count + i] for i in range(len(plan.small)))]
    checks: list[OutputCheck] = []
    for group in groups:
        checks += _check_group(plan, answer, runs, list(group), max_ratio)
    return checks


def _check_group(
    plan: _Plan, answer: Answer, runs: Runs, group: list[int], max_ratio: float
) -> list[OutputCheck]:
    unit = UNIT[plan.reference.precision]
    failed = next((i for i in group if answer.results[i] is None), None)
    if failed is not None:
        reason = f"onnxruntime fails on this input: {answer.failures[failed]}"
        shape = tuple(runs.own[group[0]][0].shape)
        return [OutputCheck("outputs", shape, "", math.inf, unit, math.inf, False, reason)]
    declared = {
        value.name: type_name(value.type.tensor_type.elem_type) for value in plan.proto.graph.output
    }
    checks = []
    for k, name in enumerate(answer.outputs):
        mine = [outs[k] for i in group if (outs := answer.results[i]) is not None]
        budget = [runs.rounded[i][k] for i in group]
        own = [runs.own[i][k] for i in group]
        same = mine[0].dtype == own[0].dtype
        like = [a.astype(b.dtype) for a, b in zip(budget, own, strict=True)] if same else budget
        truth = [runs.exact[i][k] for i in group]
        check = check_output(
            name,
            mine,
            like,
            truth,
            unit=unit,
            max_ratio=max_ratio,
            sound=plan.reference.sound,
            resolution=resolution_of(plan.proto, name),
        )
        if runs.dtypes[k] == "bfloat16" and declared[name] not in ("bfloat16", "float32"):
            reason = f"its dtype is {declared[name]}, not bfloat16"
            check = replace(check, dtype=declared[name], passed=False, reason=reason)
        checks.append(check)
    return checks


def _check_layers(plan: _Plan, staged: Staged, answer: Answer) -> Findings:
    claims = metadata_of(plan.proto)
    rounding = Rounding(
        plan.reference.weights,
        plan.reference.precision,
        claimed=FOLDED in claims,
    )
    values = dict(answer.values)
    if staged.values_model:
        values |= dict(zip(plan.names, _feed(plan, plan.samples[plan.shown]), strict=True))
    return check_layers(
        plan.reference,
        plan.samples[plan.shown],
        staged.graph,
        values,
        rounding,
        rewritten=plan.rewritten,
    )


def _report(
    plan: _Plan,
    staged: Staged,
    answer: Answer,
    outputs: list[OutputCheck],
    found: Findings,
    max_ratio: float,
    localize: bool,  # noqa: FBT001  # a private function with one caller
    start: float,
) -> VerifyReport:
    wrong = [*found.faults]
    wrong += [output_fault(check) for check in outputs if not check.passed and check.comparable]
    first = _first(wrong, found) if localize else None
    parted = next((check for check in outputs if not check.comparable), None)
    if parted is not None and not wrong:
        first = _without_truth(plan, parted)
    own = batch_of(plan.pooled[0])
    notes = [*staged.notes, *found.notes]
    if odd := _no_numbers(plan):
        notes.append(f"{odd}: of what comes of these only the kind is compared")
    notes += [
        f"output {name!r}: compared to {max_ratio:g} times {SIGMOID:.1e}, which is what "
        "onnxruntime's Sigmoid errs by"
        for name in dict.fromkeys(check.name for check in outputs if check.resolution)
    ]
    if staged.values_model and not plan.where.on_cpu:
        notes.append("layers: their values are of the CPU; outputs are of the provider")
    if answer.proof.get("checker"):
        notes.append(f"onnx.checker refuses the file: {answer.proof['checker']}")
    if answer.values_failure:
        notes.append(f"layers: not compared, onnxruntime cannot show them: {answer.values_failure}")
    counts = Counter(node.op_type for node in all_nodes(plan.proto))
    return VerifyReport(
        status="failed" if wrong else "passed" if parted is None else "skipped",
        path=str(plan.path),
        reference=plan.reference.name,
        provider=plan.where.provider,
        providers=answer.assigned,
        proof={**answer.proof, "ran": dict(answer.ran)},
        nodes=tuple(NodePlace(*node) for node in answer.nodes),
        precision=plan.reference.precision,
        num_inputs=len(plan.pooled),
        batch_sizes=(*([own] if own is not None else []), *plan.sizes),
        batch_norms_left=counts["BatchNormalization"],
        tiers=_tiers(found, outputs, max_ratio),
        outputs=tuple(outputs),
        layers=found.layers,
        weights=found.weights,
        notes=tuple(notes),
        first_divergence=first.message if first is not None else None,
        divergence=first,
        seconds=time.perf_counter() - start,
    )


def _no_numbers(plan: _Plan) -> str:
    """The first input that holds NaN or infinities; "" without one."""
    for sample in plan.pooled:
        for name, leaf in zip(plan.names, plan.reference.leaves(sample), strict=False):
            if count := leaf.numel() - int(torch.isfinite(leaf).sum()):
                return f"input {name!r} holds {count} NaN or infinities"
    return ""


def _without_truth(plan: _Plan, check: OutputCheck) -> Divergence:
    """Why nothing is verified, and where float32 and float64 part."""
    message, where = f"not verified: output {check.name!r}: {check.reason}", ""
    if odd := _no_numbers(plan):
        message += f"; {odd}: give numbers"
    elif where := plan.reference.parting(plan.pooled[0]):
        message += f"; they part at {where}"
    return Divergence("reference", "", where, None, math.nan, check.reason, message=message)


def _first(wrong: Sequence[Divergence], found: Findings) -> Divergence | None:
    """Wrong weights and settings say most; then where values part; then the outputs."""
    if not wrong:
        return None
    if wrong[0].tier == "outputs" and found.hint is not None:
        return found.hint
    known = [fault for fault in found.faults if fault.cause]
    if len(found.weights) > 1 and not known and not any(w.passed for w in found.weights):
        told = f"every weight differs: another checkpoint? The first is {wrong[0].message}"
        return replace(wrong[0], message=told)
    return wrong[0]


def _tiers(
    found: Findings, outputs: Sequence[OutputCheck], max_ratio: float
) -> tuple[TierCheck, ...]:
    decisive = {"weights": found.decides, "layers": False, "outputs": True}

    def tier(kind: Any, checks: Sequence[Any], limit: float, of: int, reason: str) -> TierCheck:
        failed = any(not check.passed for check in checks)
        status: Any = "failed" if failed else "passed" if checks else "skipped"
        worst = max((check.ratio for check in checks), default=math.nan)
        return TierCheck(kind, status, len(checks), of, worst, limit, decisive[kind], reason)

    why = "; ".join(found.notes)
    return (
        tier("weights", found.weights, MAX_WEIGHT_RATIO, found.wanted, why),
        tier("layers", found.layers, MAX_LAYER_RATIO, len(found.layers) + found.hidden, ""),
        tier("outputs", outputs, max_ratio, len(outputs), ""),
    )
