"""What each command does, once its options are read."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

import bnfx
from bnfx.cli.checkpoints import save_state
from bnfx.cli.checks import needs_inputs, require_batches
from bnfx.cli.inputs import (
    Inputs,
    bind,
    check_forward,
    dynamic_shapes,
    in_order,
    inputs_of,
    parse_inputs,
    require_fit,
)
from bnfx.cli.models import load_model, save_exported, save_program
from bnfx.cli.parser import FOLDING, NORMALISING
from bnfx.cli.results import DONE, FAILED, Outcome, Steps
from bnfx.cli.specs import parse_dynamic
from bnfx.cli.terminal import tell
from bnfx.errors import CaptureError, ProviderError, UsageError, VerificationError
from bnfx.gauges.walk import FoldOptions
from bnfx.graphs.normalised import normalised
from bnfx.removal import ledger_of_file
from bnfx.reports.report import FoldReport, InsertReport, Report
from bnfx.workspace import workspace


@dataclass(frozen=True)
class Given:
    """A model in the mode that the command needs, with example inputs bound to its forward."""

    model: nn.Module
    inputs: Inputs | None
    dynamic_shapes: Any = None
    #: The program whose module the model is, with the free axes that it has.
    program: ExportedProgram | None = None

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


#: Options that are for models alone, and that an `.onnx` file leaves no choice in.
_OF_MODELS = (
    "checkpoint",
    "dynamic",
    "dynamic_batch",
    "opset",
    "output_name",
    "external_data",
    "benchmark",
    "bundle",
    "form",
    "tune",
    *NORMALISING,
)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def run(options: argparse.Namespace, steps: Steps) -> Outcome:
    """Carry out the command that `options` names."""
    return _RUN[options.command](options, steps)


def _given(options: argparse.Namespace, steps: Steps, *, training: bool = False) -> Given:
    checkpoint = None if options.checkpoint is None else Path(options.checkpoint)
    with steps("loading the model"):
        loaded = load_model(options.model, checkpoint, options.checkpoint_key)
    if loaded.note and not options.quiet:
        tell(f"checkpoint {checkpoint}: {loaded.note}")
    model = loaded.model if loaded.program or training else loaded.model.eval()
    inputs = loaded.inputs
    if options.input:
        inputs = bind(model, parse_inputs(options.input))
    if inputs is None:
        return Given(model, None, program=loaded.program)
    scale, mean, std = (getattr(options, name, None) for name in NORMALISING)
    if not scale is mean is std is None:
        first = next(iter(inputs.args), None)
        try:
            model = normalised(model, first, scale=scale, mean=mean, std=std)
        except CaptureError as error:
            raise UsageError(str(error)) from None
    check_forward(model, inputs)
    dynamic, batch = getattr(options, "dynamic", []), getattr(options, "dynamic_batch", False)
    shapes = dynamic_shapes(inputs, dynamic, batch=batch)
    if shapes is not None:
        return Given(model, inputs, shapes)
    return Given(model, inputs, loaded.dynamic_shapes, loaded.program)


def _inspect(options: argparse.Namespace, steps: Steps) -> Outcome:
    if options.model.endswith(".onnx"):
        return _inspect_file(options, steps)
    steps.total = 3 if options.input or options.model.endswith(".pt2") else 2
    given = _given(options, steps)
    folding = _folding(options)
    with steps("folding, for the plan"):
        plan = bnfx.plan_fold(given.model, given.args, example_kwargs=given.kwargs, **folding)
    failure = _policy(options, plan.left)
    if given.inputs is None:
        return Outcome(plan, failure, _code(failure))
    with steps("exporting, for the ledger"):
        stages = bnfx.removal_ledger(
            given.model, given.args, kwargs=given.kwargs, fold_options=folding
        )
    return Outcome(stages, failure, _code(failure), {"fold": plan})


def _inspect_file(options: argparse.Namespace, steps: Steps) -> Outcome:
    if options.input or options.checkpoint or _asks_folding(options):
        raise UsageError(
            "an .onnx file is inspected as it is: leave --input, --checkpoint and options of "
            "folding out"
        )
    steps.total = 1
    found = bnfx.inspect_onnx(options.model)
    more: dict[str, Report] = {}
    failure = _policy(options, len(found.batch_norms))
    try:
        with steps("optimising it in onnxruntime, for the ledger"):
            more["stages"] = bnfx.removal_ledger(None, f=options.model)
    except ProviderError as error:
        tell(f"without the ledger of onnxruntime's levels: {error}")
    except VerificationError as error:  # readable, and yet no file to run
        failure = failure or str(error)
    return Outcome(found, failure, _code(failure), more)


def _insert(options: argparse.Namespace, steps: Steps) -> Outcome:
    steps.total = 3 if options.file else 2
    given = _given(options, steps, training=True)
    form = options.form or "module"
    wanted: dict[str, Any] = {"init": options.init, "placement": options.placement, "form": form}
    if options.calibration:
        batches = (bind(given.model, parse_inputs([f])) for f in options.calibration)
        wanted["calibration_data"] = [
            batch.args if batch.names else dict(batch.values) for batch in batches
        ]
    with steps("inserting"):
        inserted = bnfx.insert_bn(
            given.model,
            given.args,
            example_kwargs=given.kwargs,
            include=options.include,
            exclude=options.exclude,
            **wanted,
        )
    done = bnfx.report(inserted)
    assert isinstance(done, InsertReport)
    _require_matches(options, done)
    if not options.file:
        return Outcome(done, written="Nothing was written: name a file to keep it.")
    with steps(f"writing {options.file}"):
        save_state(inserted, Path(options.file))
    how = "" if form == "module" else f", form={form!r}"
    use = f"bnfx.insert_bn(model{how}).load_state_dict({_reading(options.file)})"
    return Outcome(done, written=f"{options.file} has the state dict: {use}")


def _require_matches(options: argparse.Namespace, done: InsertReport) -> None:
    """A glob that no layer fits is a typing error, and would leave the wrong layers alone."""
    paths = [site.path for site in done.sites]
    for name, globs in (("--include", options.include), ("--exclude", options.exclude)):
        for pattern in globs or ():
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise UsageError(
                    f"{name} {pattern!r} fits no layer; the layers are {', '.join(paths[:20])}"
                )


def _reading(file: str) -> str:
    """How the state dict in a file is read."""
    reader = "safetensors.torch.load_file" if file.endswith(".safetensors") else "torch.load"
    return f"{reader}({file!r})"


def _fold(options: argparse.Namespace, steps: Steps) -> Outcome:
    if options.model.endswith(".onnx"):
        return _fold_file(options, steps)
    steps.total = 3 if options.file else 2
    given = _given(options, steps)
    exporting = needs_inputs(options)
    form: Any = options.form or "graph"
    program = given.program if exporting else None
    source: Any = given.model if program is None else program
    if exporting and program is None:
        given.required()
    with steps("folding"):
        folded: Any = bnfx.fold_bn(
            source, given.args, example_kwargs=given.kwargs, form=form, **_folding(options)
        )
    done = bnfx.report(folded)
    assert isinstance(done, FoldReport)
    if failure := _policy(options, done.left):
        return Outcome(done, failure, FAILED)
    if not options.file:
        return Outcome(done, written="Nothing was written: name a file to keep it.")
    with steps(f"writing {options.file}"):
        if exporting:
            use = f"is a program: torch.export.load({options.file!r}).module() runs it."
        if program is not None:
            save_program(folded, Path(options.file))
        elif exporting:
            save_exported(folded, given.required(), given.dynamic_shapes, Path(options.file))
        else:
            save_state(folded, Path(options.file))
            how = "" if form == "graph" else f", form={form!r}"
            reading = _reading(options.file)
            use = f"has the state dict: bnfx.fold_bn(model{how}).load_state_dict({reading})"
    return Outcome(done, written=f"{options.file} {use}")


def _fold_file(options: argparse.Namespace, steps: Steps) -> Outcome:
    """Fold an `.onnx` file into another, or into itself, and verify it against what it was."""
    for name in _OF_MODELS:
        if getattr(options, name, None):
            raise UsageError(f"an .onnx file stays as it is otherwise: leave --{_dashed(name)} out")
    if options.drop_dead:
        raise UsageError(
            "--drop-dead changes shapes, which an .onnx file states in many places; use it on the "
            "model that the file was made from"
        )
    deploys = options.command == "deploy"
    steps.total = 1 + deploys
    folding = {name: value for name, value in _folding(options).items() if name != "drop_dead"}
    args = _inputs_of_file(options) if options.input else None
    checks = _check_options(options) if deploys else {}
    with steps("folding and verifying"):
        try:
            done = bnfx.fold_onnx(
                options.model,
                options.file,
                args=args,
                verify_options=checks,
                max_batch_norms_left=options.max_batch_norms_left,
                **folding,
            )
        except VerificationError as error:
            if not isinstance(error.report, Report):
                raise
            return Outcome(error.report, str(error).partition("\n")[0], FAILED)
    if not deploys or not done.batch_norms:
        return Outcome(done)
    with steps("optimising it in onnxruntime, for the ledger"):
        stages = ledger_of_file(done.batch_norms, Path(options.file))
    return Outcome(done, more={"stages": stages})


def _folding(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `fold_bn`."""
    return {name: getattr(options, name) for name in FOLDING}


def _settled(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `fold_bn` that a race leaves alone: what was asked for."""
    usual = dataclasses.asdict(FoldOptions())
    asked = _folding(options).items()
    return {name: value for name, value in asked if not options.tune or value != usual[name]}


def _asks_folding(options: argparse.Namespace) -> bool:
    return _folding(options) != dataclasses.asdict(FoldOptions())


def _export(options: argparse.Namespace, steps: Steps) -> Outcome:
    if _asks_folding(options) and not options.fold:
        raise UsageError("options of folding need --fold")
    steps.total = 3 if options.fold else 2
    given = _given(options, steps)
    inputs = given.required()
    model = given.model
    if options.fold:
        with steps("folding"):
            model = bnfx.fold_bn(
                model, inputs.args, example_kwargs=inputs.kwargs, **_folding(options)
            )
    with steps("exporting"):
        done = bnfx.export_onnx(model, inputs.args, options.file, **_onnx_options(options, given))
    check = " ".join(["bnfx verify", shlex.join([options.model, options.file, *_inputs(options)])])
    return Outcome(done, written=f"To verify it: {check}")


def _inputs(options: argparse.Namespace) -> list[str]:
    return [word for spec in options.input for word in ("--input", spec)]


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


def _verify(options: argparse.Namespace, steps: Steps) -> Outcome:
    checks = _check_options(options)
    if options.model.endswith(".onnx"):
        steps.total = 1
        args = _inputs_of_file(options) if options.input else None
        with steps("verifying"):
            done = bnfx.verify_onnx(options.model, options.file, args, **checks)
    else:
        steps.total = 2
        given = _given(options, steps)
        inputs = given.required()
        _require_batches_of(options, inputs)
        with steps("verifying"):
            done = bnfx.verify_onnx(
                given.model, options.file, inputs.args, kwargs=inputs.kwargs, **checks
            )
    failure = "" if done else f"{options.file} {done.status}: {done.first_divergence}"
    failure = failure or _policy(options, done.batch_norms_left)
    return Outcome(done, failure, _code(failure))


def _require_batches_of(options: argparse.Namespace, inputs: Inputs) -> None:
    """Whether a batch is fixed is in the file that is verified."""
    if options.batch_sizes is not None:
        kinds = bnfx.inspect_onnx(options.file).inputs.values()
        axes = [kind.partition("[")[2].partition(",")[0].rstrip("]") for kind in kinds]
        free = any(axis and not axis.isdecimal() for axis in axes)
        require_batches(options.batch_sizes, _batches(inputs), free=free)


def _batches(inputs: Inputs) -> list[int]:
    return [value.shape[0] for value in inputs.values.values() if value.dim()]


def _deploy(options: argparse.Namespace, steps: Steps) -> Outcome:
    if options.model.endswith(".onnx"):
        return _fold_file(options, steps)
    steps.total = 5 + options.benchmark + options.tune
    given = _given(options, steps)
    inputs = given.required()
    if inputs.values:  # those of a .pt2 file have their own free axes
        free = options.dynamic_batch or any(parse_dynamic(d)[1] == 0 for d in options.dynamic)
        require_batches(options.batch_sizes, _batches(inputs), free=free)
    if options.checkpoint is None and ":" in options.model and not options.quiet:
        tell("no --checkpoint: these are the weights that the factory makes, initial or its own")
    try:
        with steps("fold") as show:
            done = bnfx.deploy(
                given.model,
                inputs.args,
                options.file,
                benchmark=options.benchmark,
                bundle=options.bundle,
                tune=options.tune,
                form=options.form or "graph",
                fold_options=_settled(options),
                max_batch_norms_left=options.max_batch_norms_left,
                progress=show,
                **_onnx_options(options, given),
                **_check_options(options),
            )
    except VerificationError as error:
        if not isinstance(error.report, Report):
            raise
        return Outcome(error.report, str(error).partition("\n")[0], FAILED)
    return Outcome(done, details=(done.fold, done.stages))


def _check_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("num_inputs", "batch_sizes", "precision", "max_ratio")
    given = vars(options)
    return _place(options) | {name: given[name] for name in names if name in given}


def _place(options: argparse.Namespace) -> dict[str, Any]:
    """Where to run."""
    return {
        "provider": options.provider,
        "provider_options": dict(options.provider_option),
        "allow_on_cpu": options.allow_on_cpu,
    }


def _prove(options: argparse.Namespace, steps: Steps) -> Outcome:
    steps.total = 1
    args = _inputs_of_file(options) if options.input else None
    checks = _check_options(options)
    with steps("proving"):
        done = bnfx.prove_onnx(options.model, args, **checks)
    failure = "" if done else done.headline().verdict
    return Outcome(done, failure, _code(failure))


def _bench(options: argparse.Namespace, steps: Steps) -> Outcome:
    measured = _place(options) | {
        name: getattr(options, name) for name in ("precision", "num_runs", "num_threads")
    }
    if not options.model.endswith(".onnx"):
        return _bench_model(options, steps, measured)
    if _asks_folding(options):
        raise UsageError("an .onnx file is measured as it is: leave options of folding out")
    steps.total = 1
    args = _inputs_of_file(options)
    with steps("measuring"):
        done = bnfx.benchmark_onnx(options.model, args, baseline=options.baseline, **measured)
    return Outcome(done)


def _inputs_of_file(options: argparse.Namespace) -> tuple[Tensor, ...]:
    """Inputs for the `.onnx` file that is the model: those given, or drawn by its declarations."""
    if options.checkpoint:
        raise UsageError("an .onnx file holds its weights: leave --checkpoint out")
    found = bnfx.inspect_onnx(options.model)
    given = parse_inputs(options.input)
    if not given:
        return tuple(inputs_of(found).values())
    ordered = in_order(given, found.inputs)
    require_fit(ordered.values(), found, cast=options.command in ("verify", "prove"))
    return tuple(ordered.values())


def _bench_model(options: argparse.Namespace, steps: Steps, measured: Mapping[str, Any]) -> Outcome:
    """Export a model unfolded and folded, and measure the two files."""
    if options.baseline is not None:
        raise UsageError("a model is measured against itself unfolded: leave --baseline out")
    steps.total = 3
    given = _given(options, steps)
    inputs = given.required()
    with workspace() as folder:
        files = [folder / name for name in ("folded.onnx", "unfolded.onnx")]
        with steps("exporting"):
            folded = bnfx.fold_bn(
                given.model, inputs.args, example_kwargs=inputs.kwargs, **_folding(options)
            )
            for model, file in zip((folded, given.model), files, strict=True):
                bnfx.export_onnx(model, inputs.args, file, kwargs=inputs.kwargs)
        with steps("measuring"):
            done = bnfx.benchmark_onnx(
                files[0], inputs.args, baseline=files[1], kwargs=inputs.kwargs, **measured
            )
    arms = (
        replace(arm, path=f"{options.model}, {Path(arm.path).stem}" if arm.arm != "floor" else "-")
        for arm in done.arms
    )
    return Outcome(replace(done, arms=tuple(arms)))


def _policy(options: argparse.Namespace, left: int) -> str:
    most = options.max_batch_norms_left
    if most is None or left <= most:
        return ""
    return f"policy: {left} BatchNorms stay, and at most {most} may (--max-batch-norms-left)"


def _code(failure: str) -> int:
    return FAILED if failure else DONE


_RUN: dict[str, Callable[[argparse.Namespace, Steps], Outcome]] = {
    "inspect": _inspect,
    "insert": _insert,
    "fold": _fold,
    "export": _export,
    "verify": _verify,
    "deploy": _deploy,
    "bench": _bench,
    "prove": _prove,
}
