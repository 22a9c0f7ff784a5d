"""`deploy`: fold, export, verify, measure, and only then move the file into place."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfx.benchmark import BenchReport, benchmark_onnx
from bnfx.errors import CaptureError, VerificationError
from bnfx.export import ExportReport, export_onnx
from bnfx.folding import fold_exactly
from bnfx.graphs.brought import brought, needed
from bnfx.graphs.examples import Example, clone, obstacle, training_modules
from bnfx.graphs.normalised import Values, normalised
from bnfx.graphs.tracing import NO_PROXY, assemble
from bnfx.onnx_files.placing import move_into_place, real_target
from bnfx.removal import StageReport, ledger_of
from bnfx.reports.document import Facts, Headline, Section, Table
from bnfx.reports.report import FoldReport, Report, check_report_path, remember
from bnfx.reports.report import report as report_of
from bnfx.runtime.providers import Where
from bnfx.verification.references import Precision
from bnfx.verification.samples import as_sample
from bnfx.verification.verdicts import VerifyReport
from bnfx.verify import verify_onnx
from bnfx.version import versions
from bnfx.workspace import workspace


@dataclass(frozen=True)
class DeployReport(Report):
    """What was done, step by step."""

    #: After a failure the older file is still there.
    status: Literal["deployed", "failed"]
    path: str
    #: What became of every BatchNorm in the graph.
    fold: FoldReport
    #: Which stage removed each, onnxruntime's included.
    stages: StageReport
    #: What was written.
    export: ExportReport
    #: What was checked.
    verify: VerifyReport
    #: Latency against the unfolded model; None if not asked for.
    benchmark: BenchReport | None
    #: Folder that reproduces the failure; None without a failure or if not asked for.
    bundle: str | None
    #: Wall-clock time by step.
    seconds: Mapping[str, float]

    def __bool__(self) -> bool:
        return self.status == "deployed"

    def headline(self) -> Headline:
        """Whether the file is in place, and what verification found."""
        found = self.verify.headline()
        facts: Facts = (
            ("BatchNorms folded", f"{self.fold.folded} of {len(self.fold.batch_norms)}"),
            ("size", f"{self.export.size:,} bytes"),
            ("opset", str(self.export.opset)),
        )
        if self.benchmark is not None and self.benchmark.ratio is not None:
            facts += (("latency, to the unfolded file", f"{self.benchmark.ratio:.3f}"),)
        title, facts = f"bnfx: deploy {self.path}", (*facts, *found.facts)
        if self:
            done = f"it computes what {self.verify.reference} computes."
            return Headline(title, found.status, f"{self.path} is in place; {done}", facts)
        why = self.verify.first_divergence or found.verdict
        verdict = f"{self.path} was not written; an older file is as it was. {why}"
        return Headline(title, "bad", verdict, facts)

    def sections(self) -> Iterator[Section]:
        """What verification found, who removed which BatchNorm, the graphs, and the rest."""
        verification, *errors = self.verify.sections()
        _, *graphs = self.fold.sections()  # the ledger of stages has what its table has
        yield from (verification, *self.stages.sections(), *graphs, *errors)
        if self.benchmark is not None:
            yield from self.benchmark.sections()
        yield from self.export.sections()
        steps = tuple((step, f"{seconds:.2f}") for step, seconds in self.seconds.items())
        yield Section("Time of the steps", (Table("", ("step", "seconds"), steps),))

    def __rich__(self) -> RenderableType:
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        parts: list[RenderableType] = [Text(f"deploy: {self.status}. {self.path} ({steps})")]
        parts += [self.stages.rest(), self.export, self.verify]
        parts += [self.benchmark] if self.benchmark is not None else []
        parts += [Text(f"to reproduce it: {self.bundle}")] if self.bundle is not None else []
        return Group(*parts)


def deploy(
    model: nn.Module | ExportedProgram,
    args: Any,
    f: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    provider_options: Mapping[str, Any] | None = None,
    allow_on_cpu: Sequence[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
    external_data: bool | None = None,
    num_inputs: int = 8,
    inputs: Sequence[Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    precision: Precision = "fp32",
    max_ratio: float = 4.0,
    benchmark: bool = False,
    bundle: str | os.PathLike[str] | None = None,
    fold_options: Mapping[str, Any] | None = None,
    form: Literal["graph", "module"] = "graph",
    max_batch_norms_left: int | None = None,
    input_scale: Values = None,
    input_mean: Values = None,
    input_std: Values = None,
    progress: Callable[[str], None] | None = None,
) -> DeployReport:
    """Fold `model`, export it, verify the file against `model`, then move it into place.

    Args:
        model: The unfolded model in eval mode; left bit-identical. Or an exported program, which
            brings its inputs and free axes.
        args: Tuple of positional example arguments, or a lone tensor; None for a program's own.
        f: Where the file goes; an older file stays as it is unless every check passes.
        provider: Where to verify and measure: "cpu", "cuda", "cuda:1" or another, as in
            `verify_onnx`.
        provider_options: Options of the provider, as in `verify_onnx`.
        allow_on_cpu: Operators that may run on the CPU all the same, as in `verify_onnx`.
        report: Where to write the report, also after a failure; the suffix says how.
        kwargs: Example keyword arguments.
        input_names: Names for the inputs, in order.
        output_names: Names for the outputs, in order.
        dynamic_shapes: As for `torch.onnx.export`, such as `({0: "batch"},)`.
        opset_version: 18 or later; None takes the exporter's default.
        external_data: Whether weights go to a file beside `f`; None decides by size.
        num_inputs: Inputs to pool the error over.
        inputs: Inputs to use instead of drawn ones, each like `args`.
        batch_sizes: Batch sizes to run besides that of `args`, as in `verify_onnx`.
        precision: What the budget is taken from.
        max_ratio: Limit of the error, in budgets.
        benchmark: Whether to measure the file against the unfolded model.
        bundle: Folder to fill, after a failure, with what reproduces it: the file, the inputs, the
            report and the environment.
        fold_options: Options of `fold_bn`, such as `{"merge_branches": False}`.
        form: What is exported: "graph", or "module" for a folded copy of the model's own class.
        max_batch_norms_left: How many BatchNorms may stay; where more do, nothing is exported.
        progress: Called with the name of each step as it starts: "fold", "export", "verify",
            "ledger", "benchmark", "report".
        input_scale: With this, `input_mean` or `input_std`, the file takes x and computes
            model((x * input_scale - input_mean) / input_std), x its first argument [N, C, ...] as
            `args` gives it, such as pixels in uint8; one number or C. Scales always fold into the
            first layers, means where these pad nothing; else one subtraction stays.
        input_mean: What is subtracted, in units of the scaled input.
        input_std: What that is divided by.

    Raises:
        VerificationError: The file does not compute what `model` computes, and `.report` of the
            error is the `DeployReport`; or more BatchNorms stay than may: the `FoldReport`.
        CaptureError, FoldError, ExportError, ProviderError: As from the steps.
    """
    if isinstance(model, ExportedProgram):
        source = brought(model, args, kwargs)
        args, kwargs = needed(source)
        model, dynamic_shapes = source.module, dynamic_shapes or source.dynamic_shapes
    if not isinstance(model, nn.Module):
        raise CaptureError(obstacle(model))
    if any(value is not None for value in (input_scale, input_mean, input_std)):
        first = next(iter(as_sample(args).args), None)
        model = normalised(model, first, scale=input_scale, mean=input_mean, std=input_std)
    Where.of(provider, provider_options, allow_on_cpu)
    target, seconds = real_target(f), dict[str, float]()
    tell = progress or (lambda _: None)
    timed = partial(_timed, seconds, tell)
    if report is not None:
        check_report_path(Path(report))
    with timed("fold"):
        _try_example(model, args, kwargs)
        both = fold_exactly(model, args, example_kwargs=kwargs, form=form, **(fold_options or {}))
        folded, exact, plan = both.rounded, both.exact, report_of(both.rounded)
        del both
    assert isinstance(plan, FoldReport)
    if max_batch_norms_left is not None and plan.left > max_batch_norms_left:
        if report is not None:
            plan.write(Path(report))
        said = f"{plan.left} BatchNorms stay, and at most {max_batch_norms_left} may"
        raise VerificationError(
            f"{target} was not written: {said}. An older file is as it was", plan
        )
    options: dict[str, Any] = {
        "kwargs": kwargs,
        "input_names": input_names,
        "output_names": output_names,
        "dynamic_shapes": dynamic_shapes,
        "opset_version": opset_version,
        "external_data": external_data,
    }
    place: dict[str, Any] = {
        "provider": provider,
        "provider_options": provider_options,
        "allow_on_cpu": allow_on_cpu,
        "precision": precision,
    }
    checks: dict[str, Any] = {
        **place,
        "num_inputs": num_inputs,
        "inputs": inputs,
        "batch_sizes": batch_sizes,
        "max_ratio": max_ratio,
    }
    with workspace(target) as folder:
        written = folder / target.name
        with timed("export"):
            exported = _export(folded, model, args, written, options)
        del folded  # verification needs the memory
        with timed("verify"):
            verified = verify_onnx(model, written, args, kwargs=kwargs, exact=exact, **checks)
        with timed("ledger"):
            stages = ledger_of(plan, written)
        measured = None
        if benchmark and verified:
            with timed("benchmark"):
                measured = _measure(model, args, written, place, options)
        kept = None
        if not verified and bundle is not None:
            kept = _kept(Path(bundle), written, args, kwargs, verified)
        if verified:
            move_into_place(written, target)
    done = DeployReport(
        "deployed" if verified else "failed",
        str(target),
        plan,
        stages,
        replace(exported, path=str(target)),
        replace(verified, path=str(target)),
        measured and _renamed(measured, {str(written): str(target)}),
        kept,
        seconds,
    )
    if report is not None:
        tell("report")
        done.write(Path(report))
    if not done:
        raise VerificationError(
            f"{target} was not written: {verified.first_divergence}. An older file is as it was; "
            "print the .report of this error, or deploy with bundle='folder' to keep what shows it",
            done,
        )
    return done


def _renamed(measured: BenchReport, names: Mapping[str, str]) -> BenchReport:
    """The report with the file's place instead of where it was measured; what is gone has none."""
    arms = (replace(arm, path=names.get(arm.path, "-")) for arm in measured.arms)
    return replace(measured, arms=tuple(arms))


def _export(
    folded: nn.Module, model: nn.Module, args: Any, written: Path, options: Mapping[str, Any]
) -> ExportReport:
    """Write the file; a graph keeps arguments as inputs that files have none for."""
    if not isinstance(folded, fx.GraphModule):
        return export_onnx(folded, args, written, **options)
    given = as_sample(args, options["kwargs"])
    numbers, taken, own = _taken(model, given, options["dynamic_shapes"])
    fixed = _with_numbers(folded, numbers)
    return export_onnx(fixed, taken.args, written, **{**options, **own})


def _taken(
    model: nn.Module, example: Example, dynamic_shapes: Any
) -> tuple[dict[str, Any], Example, dict[str, Any]]:
    """Arguments that are None or numbers, the others, and options of the export for these.

    A file has no input for a number, and the exporter names no axes beside one.
    """
    bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    numbers = {name: value for name, value in bound.items() if isinstance(value, NO_PROXY)}
    if not numbers:
        return {}, example, {}
    positional = list(bound)[: len(example.args)]
    stays = [name not in numbers for name in positional]
    args = tuple(itertools.compress(example.args, stays))
    kwargs = {name: value for name, value in example.kwargs.items() if name not in numbers}
    if isinstance(dynamic_shapes, Mapping):
        shapes: Any = {k: v for k, v in dynamic_shapes.items() if k not in numbers}
    elif isinstance(dynamic_shapes, tuple | list):
        shapes = tuple(itertools.compress(dynamic_shapes, stays))
    else:
        shapes = dynamic_shapes
    return numbers, Example(args, kwargs), {"kwargs": kwargs, "dynamic_shapes": shapes}


def _with_numbers(folded: fx.GraphModule, numbers: Mapping[str, Any]) -> fx.GraphModule:
    """The graph with these arguments fixed; it shares its weights with `folded`."""
    if not numbers:
        return folded
    graph = copy.deepcopy(folded.graph)
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.target in numbers]:
        value = numbers[str(node.target)]

        def fixed(arg: Any, node: fx.Node = node, value: Any = value) -> Any:
            return value if arg is node else arg

        for user in list(node.users):
            user.args = fx.node.map_aggregate(user.args, fixed)
            user.kwargs = fx.node.map_aggregate(user.kwargs, fixed)
        graph.erase_node(node)
    return remember(assemble(folded, graph), report_of(folded))


def _kept(
    bundle: Path, written: Path, args: Any, kwargs: Mapping[str, Any] | None, found: VerifyReport
) -> str:
    """Where what reproduces a failure lies, or why it does not: that must not hide the failure."""
    try:
        _write_bundle(bundle, written, args, kwargs, found)
    except OSError as error:
        return f"the bundle {bundle} cannot be written: {error}"
    return str(bundle)


def _write_bundle(
    folder: Path, f: Path, args: Any, kwargs: Mapping[str, Any] | None, found: VerifyReport
) -> None:
    """Fill `folder`, made if need be.

    It holds the ONNX file with its external data, `inputs.npz` with the example's tensors in order,
    `report.json`, `report.txt` and `environment.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (f, *f.parent.glob(f"{f.name}.*")):
        shutil.copy2(path, folder / path.name)
    example = as_sample(args, kwargs)
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    tensors = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
    arrays: dict[str, Any] = {
        f"input_{i}": (t.float() if t.dtype is torch.bfloat16 else t).numpy()
        for i, t in enumerate(tensors)
    }
    with (folder / "inputs.npz").open("wb") as out:
        np.savez(out, **arrays)
    (folder / "report.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    (folder / "report.txt").write_text(f"{found}\n")
    (folder / "environment.json").write_text(json.dumps(versions(), indent=1) + "\n")


def _measure(
    model: nn.Module,
    args: Any,
    written: Path,
    place: Mapping[str, Any],
    options: Mapping[str, Any],
) -> BenchReport:
    """Against what the exporter makes of the unfolded model by itself."""
    unfolded = written.with_name("unfolded.onnx")
    export_onnx(model, args, unfolded, **options)
    return benchmark_onnx(written, args, baseline=unfolded, kwargs=options["kwargs"], **place)


def _try_example(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> None:
    """The model must run on the example before anything is made of it."""
    if training_modules(model):
        return  # the exporter says which
    example = as_sample(args, kwargs)
    try:
        with torch.no_grad():
            clone(model)(*copy.deepcopy(example.args), **copy.deepcopy(dict(example.kwargs)))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise CaptureError(
            f"{type(model).__name__} fails on the example: {error}. Give args and kwargs that it "
            "runs on"
        ) from error


@contextmanager
def _timed(seconds: dict[str, float], tell: Callable[[str], None], step: str) -> Iterator[None]:
    tell(step)
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = time.perf_counter() - start
