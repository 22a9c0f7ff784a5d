"""`deploy`: fold, export, verify, measure, and only then move the file into place."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import fx, nn
from torch.export import ExportedProgram

from bnfx.benchmark import BenchReport, benchmark_onnx
from bnfx.bundle import keep
from bnfx.errors import CaptureError, VerificationError
from bnfx.export import ExportReport, export_onnx
from bnfx.folding import Folded, fold_exactly
from bnfx.graphs.brought import brought, needed
from bnfx.graphs.examples import clone, obstacle, training_modules
from bnfx.graphs.fixed_arguments import with_numbers, without_numbers
from bnfx.graphs.normalised import Values, normalised
from bnfx.onnx_files.placing import move_into_place, real_target
from bnfx.removal import StageReport, ledger_of
from bnfx.reports.document import Facts, Headline, Section, Table
from bnfx.reports.report import FoldReport, Report, check_report_path
from bnfx.reports.report import report as report_of
from bnfx.runtime.providers import Where
from bnfx.tuning import Options, race
from bnfx.verification.references import Precision
from bnfx.verification.samples import as_sample
from bnfx.verification.verdicts import VerifyReport
from bnfx.verify import verify_onnx
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
    #: Latencies of the ways of folding that were raced; None if not asked for, or only one is left.
    tuning: BenchReport | None
    #: Options of `fold_bn` in effect, but for those left at their defaults.
    fold_options: Mapping[str, Any]
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
        if self.tuning is not None:
            facts += (("fastest options", self._options()),)
        title, facts = f"bnfx: deploy {self.path}", (*facts, *found.facts)
        if self:
            done = f"it computes what {self.verify.reference} computes."
            return Headline(title, found.status, f"{self.path} is in place; {done}", facts)
        why = self.verify.first_divergence or found.verdict
        verdict = f"{self.path} was not written; an older file is as it was. {why}"
        return Headline(title, "bad", verdict, facts)

    def _options(self) -> str:
        """Those of folding that differ from its defaults, in words."""
        given = (f"{name}={value}" for name, value in self.fold_options.items())
        return ", ".join(given) or "the defaults"

    def sections(self) -> Iterator[Section]:
        """What verification found, who removed which BatchNorm, the graphs, and the rest."""
        verification, *errors = self.verify.sections()
        _, *graphs = self.fold.sections()  # the ledger of stages has what its table has
        yield from (verification, *self.stages.sections(), *graphs, *errors)
        if self.benchmark is not None:
            yield from self.benchmark.sections()
        if self.tuning is not None:
            yield from (Section("Ways of folding", part.blocks) for part in self.tuning.sections())
        yield from self.export.sections()
        steps = tuple((step, f"{seconds:.2f}") for step, seconds in self.seconds.items())
        yield Section("Time of the steps", (Table("", ("step", "seconds"), steps),))

    def __rich__(self) -> RenderableType:
        steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        parts: list[RenderableType] = [Text(f"deploy: {self.status}. {self.path} ({steps})")]
        parts += [self.stages.rest(), self.export, self.verify]
        parts += [self.benchmark] if self.benchmark is not None else []
        if self.tuning is not None:
            parts += [Text(f"fastest options: {self._options()}"), self.tuning]
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
    tune: bool = False,
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
        tune: Whether to measure, in turns on the provider, what each option of folding gives that
            `fold_options` leaves open, and to keep the fastest file that passes. An option counts
            as faster where the middle halves of 50 runs lie apart.
        progress: Called with the name of each step as it starts: "tune", "fold", "export",
            "verify", "ledger", "benchmark", "report".
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
    if report is not None:
        check_report_path(Path(report))
    job = _Job(
        model=model,
        args=args,
        target=real_target(f),
        form=form,
        most=max_batch_norms_left,
        report=report,
        place={
            "provider": provider,
            "provider_options": provider_options,
            "allow_on_cpu": allow_on_cpu,
            "precision": precision,
        },
        checks={
            "num_inputs": num_inputs,
            "inputs": inputs,
            "batch_sizes": batch_sizes,
            "max_ratio": max_ratio,
        },
        export={
            "kwargs": kwargs,
            "input_names": input_names,
            "output_names": output_names,
            "dynamic_shapes": dynamic_shapes,
            "opset_version": opset_version,
            "external_data": external_data,
        },
        tell=progress or (lambda _: None),
    )
    _try_example(model, args, kwargs)
    with workspace(job.target) as folder:
        done = job.done(dict(fold_options or {}), folder, tune=tune, benchmark=benchmark)
        written = folder / job.target.name
        if done:
            move_into_place(written, job.target)
        elif bundle is not None:
            done = replace(done, bundle=keep(Path(bundle), written, args, kwargs, done.verify))
    if report is not None:
        job.tell("report")
        done.write(Path(report))
    if not done:
        raise VerificationError(
            f"{job.target} was not written: {done.verify.first_divergence}. An older file is as it "
            "was; print the .report of this error, or deploy with bundle='folder' to keep what "
            "shows it",
            done,
        )
    return done


@dataclass(frozen=True, eq=False)
class _Job:
    """What `deploy` was asked for, and its steps."""

    model: nn.Module
    args: Any
    target: Path
    form: Literal["graph", "module"]
    #: BatchNorms that may stay.
    most: int | None
    #: Where a report goes.
    report: str | os.PathLike[str] | None
    #: Where and how precisely it runs, as `verify_onnx` and `benchmark_onnx` say it.
    place: Mapping[str, Any]
    #: Other options of `verify_onnx`.
    checks: Mapping[str, Any]
    #: Options of `export_onnx`.
    export: Mapping[str, Any]
    tell: Callable[[str], None]
    #: Wall-clock time by step.
    seconds: dict[str, float] = field(default_factory=dict)

    def done(self, given: Options, folder: Path, *, tune: bool, benchmark: bool) -> DeployReport:
        """Make the file in `folder`: the fastest way that passes, or else the last one tried."""
        ways: tuple[Options, ...] = (given,)
        tuning = None
        if tune:
            with self._step("tune"):
                ways, tuning = self._raced(given, folder)
        for options in ways:
            done = self._attempt(options, folder / self.target.name)
            if done:
                break
        done = replace(done, tuning=tuning)
        if not benchmark or not done:
            return done
        with self._step("benchmark"):
            return replace(done, benchmark=self._measured(folder))

    def _attempt(self, options: Options, written: Path) -> DeployReport:
        """Fold, export and verify in one way."""
        with self._step("fold"):
            both, plan = self._folded(options)
            folded, exact = both.rounded, both.exact
            del both
        with self._step("export"):
            exported = self._exported(folded, written)
        del folded  # verification needs the memory
        with self._step("verify"):
            verified = verify_onnx(
                self.model,
                written,
                self.args,
                kwargs=self.export["kwargs"],
                exact=exact,
                **self.place,
                **self.checks,
            )
        with self._step("ledger"):
            stages = ledger_of(plan, written)
        return DeployReport(
            status="deployed" if verified else "failed",
            path=str(self.target),
            fold=plan,
            stages=stages,
            export=replace(exported, path=str(self.target)),
            verify=replace(verified, path=str(self.target)),
            benchmark=None,
            tuning=None,
            fold_options=options,
            bundle=None,
            seconds=self.seconds,
        )

    def _folded(self, options: Options) -> tuple[Folded, FoldReport]:
        """The folded model, if it keeps to the policy.

        Raises:
            VerificationError: More BatchNorms stay than may.
        """
        kwargs = self.export["kwargs"]
        both = fold_exactly(self.model, self.args, example_kwargs=kwargs, form=self.form, **options)
        plan = report_of(both.rounded)
        assert isinstance(plan, FoldReport)
        if self.most is None or plan.left <= self.most:
            return both, plan
        if self.report is not None:
            plan.write(Path(self.report))
        said = f"{plan.left} BatchNorms stay, and at most {self.most} may"
        raise VerificationError(
            f"{self.target} was not written: {said}. An older file is as it was", plan
        )

    def _exported(self, folded: nn.Module, written: Path) -> ExportReport:
        """Write the file; a graph keeps arguments as inputs that files have none for."""
        if not isinstance(folded, fx.GraphModule):
            return export_onnx(folded, self.args, written, **self.export)
        given = as_sample(self.args, self.export["kwargs"])
        numbers, taken, own = without_numbers(self.model, given, self.export["dynamic_shapes"])
        fixed = with_numbers(folded, numbers)
        return export_onnx(fixed, taken.args, written, **{**self.export, **own})

    def _raced(
        self, given: Options, folder: Path
    ) -> tuple[tuple[Options, ...], BenchReport | None]:
        """The ways of folding by speed."""

        def write(options: Options, path: Path) -> None:
            self._exported(self._folded(options)[0].rounded, path)

        def measure(files: Mapping[str, Path]) -> BenchReport:
            (_, first), *others = files.items()
            return self._bench(first, others=dict(others), num_runs=50)

        return race(write, given, folder, measure)

    def _measured(self, folder: Path) -> BenchReport:
        """Against what the exporter makes of the unfolded model by itself."""
        written, unfolded = folder / self.target.name, folder / "unfolded.onnx"
        export_onnx(self.model, self.args, unfolded, **self.export)
        return _renamed(self._bench(written, baseline=unfolded), {str(written): str(self.target)})

    def _bench(self, f: Path, **options: Any) -> BenchReport:
        return benchmark_onnx(f, self.args, kwargs=self.export["kwargs"], **self.place, **options)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.tell(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _renamed(measured: BenchReport, names: Mapping[str, str]) -> BenchReport:
    """The report with the file's place instead of where it was measured; what is gone has none."""
    arms = (replace(arm, path=names.get(arm.path, "-")) for arm in measured.arms)
    return replace(measured, arms=tuple(arms))


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
