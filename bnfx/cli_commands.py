"""What each command does, once its options are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torch import nn

import bnfx
from bnfx.cli_files import check_target
from bnfx.cli_inputs import Inputs, bind, check_forward, dynamic_shapes, parse_inputs
from bnfx.cli_models import CHECKPOINTS, load_model, save_exported, save_state
from bnfx.cli_output import step, write
from bnfx.document import Picture
from bnfx.errors import ProviderError, UsageError, VerificationError
from bnfx.graph_pictures import fold_pictures
from bnfx.report_files import to_html, to_json
from bnfx.reports import FoldReport, InsertReport, Report


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        report: The report.
        failure: Why the command failed; "" where it did not.
        more: Further reports, by the name under which they stand in the JSON.
        graphs: What draws the graph around each BatchNorm.
    """

    report: Report
    failure: str = ""
    more: Mapping[str, Report] = field(default_factory=dict)
    graphs: Callable[[], Sequence[Picture]] = tuple


@dataclass(frozen=True)
class Given:
    """A model in the mode that the command needs, with example inputs bound to its forward."""

    model: nn.Module
    inputs: Inputs | None
    dynamic_shapes: Any = None

    @property
    def args(self) -> tuple[Any, ...] | None:
        """Positional example inputs; None without any."""
        return None if self.inputs is None else self.inputs.args

    @property
    def kwargs(self) -> Mapping[str, Any] | None:
        """Keyword example inputs; None without any."""
        return None if self.inputs is None else self.inputs.kwargs

    def required(self) -> Inputs:
        """The inputs, which this command cannot do without."""
        if self.inputs is None:
            raise UsageError(
                "this needs example inputs: --input NAME:1x3x224x224 or --input FILE.npz"
            )
        return self.inputs


def run(options: argparse.Namespace) -> Outcome:
    """Carry out the command that `options` names."""
    return _RUN[options.command](options)


def _given(options: argparse.Namespace, *, training: bool = False) -> Given:
    with step("loading the model"):
        loaded = load_model(
            options.model, None if options.checkpoint is None else Path(options.checkpoint)
        )
    model = loaded.model if loaded.exported or training else loaded.model.eval()
    inputs = loaded.inputs
    if options.input:
        inputs = bind(model, parse_inputs(options.input))
    if inputs is None:
        return Given(model, None)
    check_forward(model, inputs)
    dynamic, batch = getattr(options, "dynamic", []), getattr(options, "dynamic_batch", False)
    shapes = dynamic_shapes(inputs, dynamic, batch=batch)
    return Given(model, inputs, loaded.dynamic_shapes if shapes is None else shapes)


def _inspect(options: argparse.Namespace) -> Outcome:
    if options.model.endswith(".onnx"):
        return _inspect_file(options)
    given = _given(options)
    with step("folding, for the plan"):
        folded = bnfx.fold_bn(given.model, given.args, example_kwargs=given.kwargs)
    plan = bnfx.report(folded)
    failure = _policy(options, _left(plan))

    def graphs() -> Sequence[Picture]:
        return fold_pictures(given.model, given.args, given.kwargs, folded)

    if given.inputs is None:
        return Outcome(plan, failure, graphs=graphs)
    with step("exporting, for the ledger"):
        stages = bnfx.removal_ledger(given.model, given.args, kwargs=given.kwargs)
    return Outcome(stages, failure, {"fold": plan}, graphs)


def _inspect_file(options: argparse.Namespace) -> Outcome:
    _require_file(options.model)
    if options.input or options.checkpoint:
        raise UsageError("an .onnx file is inspected as it is: without --input and --checkpoint")
    found = bnfx.inspect_onnx(options.model)
    with step("optimising it in onnxruntime, for the ledger"):
        stages = bnfx.removal_ledger(None, f=options.model)
    return Outcome(found, _policy(options, len(found.batch_norms)), {"stages": stages})


def _insert(options: argparse.Namespace) -> Outcome:
    given = _given(options, training=True)
    wanted: dict[str, Any] = {"init": options.init, "placement": options.placement}
    if options.calibration:
        batches = (bind(given.model, parse_inputs([f])) for f in options.calibration)
        wanted["calibration_data"] = [batch.args for batch in batches]
    with step("inserting"):
        inserted = bnfx.insert_bn(
            given.model,
            given.args,
            example_kwargs=given.kwargs,
            include=options.include,
            exclude=options.exclude,
            **wanted,
        )
    if options.file:
        save_state(inserted, Path(options.file))
    return Outcome(bnfx.report(inserted))


def _fold(options: argparse.Namespace) -> Outcome:
    given = _given(options)
    exporting = bool(options.file) and options.file.endswith(".pt2")
    if exporting:
        given.required()
    with step("folding"):
        folded = bnfx.fold_bn(given.model, given.args, example_kwargs=given.kwargs)
    done = bnfx.report(folded)
    failure = _policy(options, _left(done))
    if options.file and not failure:
        with step(f"writing {options.file}"):
            if exporting:
                save_exported(folded, given.required(), given.dynamic_shapes, Path(options.file))
            else:
                save_state(folded, Path(options.file))
    return Outcome(
        done,
        failure,
        graphs=lambda: fold_pictures(given.model, given.args, given.kwargs, folded),
    )


def _export(options: argparse.Namespace) -> Outcome:
    given = _given(options)
    inputs = given.required()
    model = given.model
    if options.fold:
        with step("folding"):
            model = bnfx.fold_bn(model, inputs.args, example_kwargs=inputs.kwargs)
    with step("exporting"):
        done = bnfx.export_onnx(model, inputs.args, options.file, **_onnx_options(options, given))
    return Outcome(done)


def _onnx_options(options: argparse.Namespace, given: Given) -> dict[str, Any]:
    inputs = given.required()
    return {
        "kwargs": inputs.kwargs,
        "input_names": inputs.names,
        "output_names": options.output_name,
        "dynamic_shapes": given.dynamic_shapes,
        "opset_version": options.opset,
        "external_data": options.external_data,
    }


def _verify(options: argparse.Namespace) -> Outcome:
    _require_file(options.file)
    given = _given(options)
    inputs = given.required()
    with step("verifying"):
        done = bnfx.verify_onnx(
            given.model,
            options.file,
            inputs.args,
            kwargs=inputs.kwargs,
            **_check_options(options),
        )
    failure = "" if done else f"{options.file} {done.status}: {done.first_divergence}"
    return Outcome(done, failure or _policy(options, done.batch_norms_left))


def _deploy(options: argparse.Namespace) -> Outcome:
    given = _given(options)
    inputs = given.required()

    def graphs() -> Sequence[Picture]:
        folded = bnfx.fold_bn(given.model, inputs.args, example_kwargs=inputs.kwargs)
        return fold_pictures(given.model, inputs.args, inputs.kwargs, folded)

    if options.max_batch_norms_left is not None:
        with step("planning"):
            plan = bnfx.plan_fold(given.model, inputs.args, example_kwargs=inputs.kwargs)
        if failure := _policy(options, _left(plan)):
            return Outcome(plan, f"{failure}; {options.file} was not written", graphs=graphs)
    try:
        with step("folding, exporting, verifying"):
            done = bnfx.deploy(
                given.model,
                inputs.args,
                options.file,
                benchmark=options.benchmark,
                bundle=options.bundle,
                **_onnx_options(options, given),
                **_check_options(options),
            )
    except VerificationError as error:
        if not isinstance(error.report, Report):
            raise
        return Outcome(error.report, str(error).partition("\n")[0], graphs=graphs)
    return Outcome(done, graphs=graphs)


def _check_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("provider", "num_inputs", "batch_sizes", "precision", "max_ratio")
    return {name: getattr(options, name) for name in names}


def _bench(options: argparse.Namespace) -> Outcome:
    _require_file(options.file)
    if options.baseline is not None:
        _require_file(options.baseline)
    values = parse_inputs(options.input)
    if not values:
        raise UsageError("this needs example inputs: --input NAME:1x3x224x224 or --input FILE.npz")
    with step("measuring"):
        done = bnfx.benchmark_onnx(
            options.file,
            tuple(values.values()),
            baseline=options.baseline,
            provider=options.provider,
            num_runs=options.num_runs,
            num_threads=options.num_threads,
        )
    return Outcome(done)


def _doctor(options: argparse.Namespace) -> Outcome:
    with step("looking at the environment"):
        done = bnfx.doctor()
    for provider in options.require:
        if reason := done.why_not(provider):
            raise ProviderError(f"{provider} is required and does not start: {reason}")
    return Outcome(done)


def _require_file(name: str) -> None:
    if not Path(name).is_file():
        raise UsageError(f"there is no file {name}")


def _left(done: FoldReport | InsertReport) -> int:
    assert isinstance(done, FoldReport)
    return sum(bn.verdict != "folded" for bn in done.batch_norms)


def _policy(options: argparse.Namespace, left: int) -> str:
    most = options.max_batch_norms_left
    if most is None or left <= most:
        return ""
    return f"policy: {left} BatchNorms stay, and at most {most} may (--max-batch-norms-left)"


_RUN: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "inspect": _inspect,
    "insert": _insert,
    "fold": _fold,
    "export": _export,
    "verify": _verify,
    "deploy": _deploy,
    "bench": _bench,
    "doctor": _doctor,
}


def check_targets(options: argparse.Namespace) -> None:
    """Refuse files that could not be written in the end, before any work is done."""
    reports = (options.json, options.markdown, options.html)
    if reports.count("-") > 1:
        raise UsageError("only one report fits on standard output")
    for name in reports:
        if name not in (None, "-"):
            check_target(Path(name), ())
    suffixes = {"insert": CHECKPOINTS, "fold": (".pt2", *CHECKPOINTS)}
    suffixes |= dict.fromkeys(("export", "deploy"), (".onnx",))
    if options.command in suffixes and options.file is not None:
        check_target(Path(options.file), suffixes[options.command])


def write_results(options: argparse.Namespace, outcome: Outcome, code: int, out: IO[str]) -> None:
    """The report to wherever the options want it; as text on standard output otherwise."""
    report = outcome.report
    head = {"command": options.command, "exit_code": code, "failure": outcome.failure}
    more = {name: part.to_dict() for name, part in outcome.more.items()}
    writers: dict[str, Callable[[], str]] = {
        "json": lambda: to_json({**head, **report.to_dict(), **more}),
        "markdown": report.to_markdown,
        "html": lambda: to_html(report, outcome.graphs()),
    }
    for kind, content in writers.items():
        target = getattr(options, kind)
        if target is not None:
            write(content(), target, out)
    if "-" not in (options.json, options.markdown, options.html):
        write("\n".join(map(str, (report, *outcome.more.values()))), "-", out)


def write_error(options: argparse.Namespace, error: Exception, code: int, out: IO[str]) -> None:
    """What stopped the command, as JSON, where JSON was asked for."""
    content = {
        "command": options.command,
        "exit_code": code,
        "error": {"type": type(error).__name__, "message": str(error)},
    }
    if options.json is not None:
        write(to_json(content), options.json, out)
