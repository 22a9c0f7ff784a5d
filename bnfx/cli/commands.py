"""What each command does, once its options are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import bnfx
from bnfx.cli.files import check_target
from bnfx.cli.inputs import (
    Inputs,
    bind,
    check_forward,
    dynamic_shapes,
    in_order,
    inputs_of,
    parse_inputs,
)
from bnfx.cli.models import CHECKPOINTS, load_model, save_exported, save_state
from bnfx.cli.output import step, tell
from bnfx.cli.parser import FOLDING
from bnfx.cli.results import DONE, FAILED, Outcome
from bnfx.errors import ProviderError, UsageError, VerificationError
from bnfx.reports.report import FoldReport, InsertReport, Report
from bnfx.workspace import workspace


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
    suffixes = {"insert": CHECKPOINTS, "fold": (".pt2", *CHECKPOINTS)}
    suffixes |= dict.fromkeys(("export", "deploy"), (".onnx",))
    if options.command in suffixes and options.file is not None:
        check_target(Path(options.file), suffixes[options.command])
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
    folding = _folding(options)
    with step("folding, for the plan"):
        folded = bnfx.fold_bn(given.model, given.args, example_kwargs=given.kwargs, **folding)
    plan = bnfx.report(folded)
    failure = _policy(options, _left(plan))

    if given.inputs is None:
        return Outcome(plan, failure, _code(failure))
    with step("exporting, for the ledger"):
        stages = bnfx.removal_ledger(
            given.model, given.args, kwargs=given.kwargs, fold_options=folding
        )
    return Outcome(stages, failure, _code(failure), {"fold": plan})


def _inspect_file(options: argparse.Namespace) -> Outcome:
    _require_file(options.model)
    if options.input or options.checkpoint or _asks_folding(options):
        raise UsageError(
            "an .onnx file is inspected as it is: leave --input, --checkpoint and options of "
            "folding out"
        )
    found = bnfx.inspect_onnx(options.model)
    more: dict[str, Report] = {}
    failure = _policy(options, len(found.batch_norms))
    try:
        with step("optimising it in onnxruntime, for the ledger"):
            more["stages"] = bnfx.removal_ledger(None, f=options.model)
    except ProviderError as error:
        tell(f"without the ledger of onnxruntime's levels: {error}")
    except VerificationError as error:  # readable, and yet no file to run
        failure = failure or str(error)
    return Outcome(found, failure, _code(failure), more)


def _insert(options: argparse.Namespace) -> Outcome:
    given = _given(options, training=True)
    wanted: dict[str, Any] = {"init": options.init, "placement": options.placement}
    if options.calibration:
        batches = (bind(given.model, parse_inputs([f])) for f in options.calibration)
        wanted["calibration_data"] = [
            batch.args if batch.names else dict(batch.values) for batch in batches
        ]
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
        folded = bnfx.fold_bn(
            given.model, given.args, example_kwargs=given.kwargs, **_folding(options)
        )
    done = bnfx.report(folded)
    failure = _policy(options, _left(done))
    if options.file and not failure:
        with step(f"writing {options.file}"):
            if exporting:
                save_exported(folded, given.required(), given.dynamic_shapes, Path(options.file))
            else:
                save_state(folded, Path(options.file))
    return Outcome(done, failure, _code(failure))


def _folding(options: argparse.Namespace) -> dict[str, bool]:
    """Options of `fold_bn`."""
    return {name: getattr(options, name) for name in FOLDING}


def _asks_folding(options: argparse.Namespace) -> bool:
    return not options.merge_branches or options.thresholds or options.border_maps


def _export(options: argparse.Namespace) -> Outcome:
    if _asks_folding(options) and not options.fold:
        raise UsageError("options of folding need --fold")
    given = _given(options)
    inputs = given.required()
    model = given.model
    if options.fold:
        with step("folding"):
            model = bnfx.fold_bn(
                model, inputs.args, example_kwargs=inputs.kwargs, **_folding(options)
            )
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
    checks = _check_options(options)
    if options.model.endswith(".onnx"):
        _require_file(options.model)
        args = _inputs_of_file(options) if options.input else None
        with step("verifying"):
            done = bnfx.verify_onnx(options.model, options.file, args, **checks)
    else:
        given = _given(options)
        inputs = given.required()
        with step("verifying"):
            done = bnfx.verify_onnx(
                given.model, options.file, inputs.args, kwargs=inputs.kwargs, **checks
            )
    failure = "" if done else f"{options.file} {done.status}: {done.first_divergence}"
    failure = failure or _policy(options, done.batch_norms_left)
    return Outcome(done, failure, _code(failure))


def _deploy(options: argparse.Namespace) -> Outcome:
    given = _given(options)
    inputs = given.required()
    try:
        with step("deploying") as show:
            done = bnfx.deploy(
                given.model,
                inputs.args,
                options.file,
                benchmark=options.benchmark,
                bundle=options.bundle,
                fold_options=_folding(options),
                max_batch_norms_left=options.max_batch_norms_left,
                progress=show,
                **_onnx_options(options, given),
                **_check_options(options),
            )
    except VerificationError as error:
        if not isinstance(error.report, Report):
            raise
        return Outcome(error.report, str(error).partition("\n")[0], FAILED)
    return Outcome(done)


def _check_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("provider", "num_inputs", "batch_sizes", "precision", "max_ratio")
    return {name: getattr(options, name) for name in names}


def _bench(options: argparse.Namespace) -> Outcome:
    measured: dict[str, Any] = {
        name: getattr(options, name) for name in ("provider", "num_runs", "num_threads")
    }
    if not options.model.endswith(".onnx"):
        return _bench_model(options, measured)
    if _asks_folding(options):
        raise UsageError("an .onnx file is measured as it is: leave options of folding out")
    if options.baseline is not None:
        _require_file(options.baseline)
    args = _inputs_of_file(options)
    with step("measuring"):
        done = bnfx.benchmark_onnx(options.model, args, baseline=options.baseline, **measured)
    return Outcome(done)


def _inputs_of_file(options: argparse.Namespace) -> tuple[Tensor, ...]:
    """Inputs for the `.onnx` file that is the model: those given, or drawn by its declarations."""
    _require_file(options.model)
    if options.checkpoint:
        raise UsageError("an .onnx file holds its weights: leave --checkpoint out")
    found = bnfx.inspect_onnx(options.model)
    given = parse_inputs(options.input)
    return tuple(in_order(given, found.inputs).values() if given else inputs_of(found).values())


def _bench_model(options: argparse.Namespace, measured: Mapping[str, Any]) -> Outcome:
    """Export a model unfolded and folded, and measure the two files."""
    if options.baseline is not None:
        raise UsageError("a model is measured against itself unfolded: leave --baseline out")
    given = _given(options)
    inputs = given.required()
    with workspace() as folder:
        files = [folder / name for name in ("folded.onnx", "unfolded.onnx")]
        with step("exporting"):
            folded = bnfx.fold_bn(
                given.model, inputs.args, example_kwargs=inputs.kwargs, **_folding(options)
            )
            for model, file in zip((folded, given.model), files, strict=True):
                bnfx.export_onnx(model, inputs.args, file, kwargs=inputs.kwargs)
        with step("measuring"):
            done = bnfx.benchmark_onnx(
                files[0], inputs.args, baseline=files[1], kwargs=inputs.kwargs, **measured
            )
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


def _code(failure: str) -> int:
    return FAILED if failure else DONE


_RUN: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "inspect": _inspect,
    "insert": _insert,
    "fold": _fold,
    "export": _export,
    "verify": _verify,
    "deploy": _deploy,
    "bench": _bench,
}
