"""Write a model as ONNX, checked, and in one step or not at all."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import RenderableType
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfx.errors import ExportError
from bnfx.graphs.agreement import outputs
from bnfx.graphs.brought import brought
from bnfx.graphs.examples import Example, clone, has_hooks, obstacle, training_modules
from bnfx.graphs.tracing import attributes_kept
from bnfx.onnx_files.placing import data_files, move_into_place, name_by_content, real_target
from bnfx.onnx_files.reading import FOLDED, OPTIONS, VERSION, all_nodes, describe_type, opset_of
from bnfx.onnx_files.signature import name_outputs, require_open
from bnfx.reports.document import Headline
from bnfx.reports.report import FoldReport, Report, table, told
from bnfx.version import OPSETS, __version__
from bnfx.workspace import workspace

_BFLOAT16_OPSET = 22  # the first with convolutions and pooling in bfloat16
_INLINE_BYTES = 1_500_000_000  # a protobuf message holds at most 2 GiB
#: Tells at each export that torchvision, which nothing here needs, is not installed.
_REGISTRATION = "torch.onnx._internal.exporter._registration"


@dataclass(frozen=True)
class ExportReport(Report):
    """What was written."""

    heading = "File"
    path: str  #: the file
    opset: int  #: version of the ONNX operator set
    inputs: Mapping[str, str]  #: name -> "dtype[shape]"
    outputs: Mapping[str, str]  #: likewise
    operators: Mapping[str, int]  #: operator type -> number of nodes, functions included
    #: BatchNormalization nodes in the file. The exporter folds some itself, so that 0 proves
    #: nothing about bnfx.
    batch_norms_left: int
    size: int  #: bytes of the file and of its external data

    def headline(self) -> Headline:
        """That it is written, and no more."""
        facts = (
            ("opset", str(self.opset)),
            ("nodes", str(sum(self.operators.values()))),
            ("BatchNormalization left", str(self.batch_norms_left)),
            ("size", f"{self.size:,} bytes"),
        )
        verdict = f"{self.path} is written, not yet verified."
        return Headline(f"bnfx: export {self.path}", "neutral", verdict, facts)

    def __rich__(self) -> RenderableType:
        values = {**self.inputs, **self.outputs}
        rows = [
            (name, "input" if name in self.inputs else "output", t) for name, t in values.items()
        ]
        title = (
            f"{self.path}: opset {self.opset}, {sum(self.operators.values())} nodes, "
            f"{self.batch_norms_left} BatchNormalization, {self.size:,} bytes"
        )
        return table(title, ("name", "", "type"), rows)


def export_onnx(
    model: nn.Module | ExportedProgram,
    args: Any,
    f: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Export `model` with torch's dynamo exporter, check the file, and move it into place.

    Args:
        model: In eval mode throughout; left bit-identical. Or a `torch.export.ExportedProgram`,
            which brings its inputs and free axes.
        args: Tuple of positional example arguments, or a lone tensor; None for a program.
        f: Where to write. An older file stays until the new one is complete.
        kwargs: Example keyword arguments.
        input_names: Names for the inputs, in order.
        output_names: Names for the outputs, in order; those left out are named after the keys or
            fields of what the model returns, `output` or `output_0`, ... where it has none.
        dynamic_shapes: As for `torch.onnx.export`, such as `({0: "batch"},)`.
        opset_version: 18 to 25; None takes the exporter's default, and 22 for bfloat16.
        external_data: Whether weights go to a file `<f>.<hash>.data`; None decides by size.

    Raises:
        ExportError: A module is in train mode, or lazy and never ran; an opset that would be
            changed silently; an axis that shall be open and the model fixes; the exporter failed;
            the file is not valid ONNX.
    """
    source = model
    if isinstance(model, ExportedProgram):
        given = brought(model)
        if dynamic_shapes is not None:
            raise ExportError(
                "an exported program has the free axes that it was exported with; leave "
                "dynamic_shapes out"
            )
        model, dynamic_shapes, args, kwargs = given.module, given.dynamic_shapes, (), {}
    if said := obstacle(model):
        raise ExportError(said)
    _require_eval(model)
    _require_opset(opset_version)
    target = real_target(f)
    opset = opset_version if opset_version is not None else _least_opset(model)
    if not isinstance(args, Tensor | tuple | list):
        raise ExportError(
            f"args is a {type(args).__name__}; give a tuple of positional arguments, or one tensor"
        )
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    options: dict[str, Any] = {
        "kwargs": dict(kwargs or {}),
        "input_names": input_names,
        "output_names": output_names,
        "dynamic_shapes": dynamic_shapes,
        "opset_version": opset,
    }
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    external = size > _INLINE_BYTES if external_data is None else external_data
    _refuse_link(Path(f), target, external=external)

    def written(**more: bool) -> ExportReport:
        program = _program(model, source, positional, **options, **more)
        _require_names(program, input_names, output_names)
        require_open(program, model, dynamic_shapes)
        name_outputs(program, output_names or ())
        _annotate(program.model.metadata_props, source)
        return _write(program, target, opset, external=external)

    try:
        try:
            return written()
        except _InvalidFileError:
            # The exporter folds a BatchNorm of float32 into a convolution of 16 bits, in float32.
            return written(optimize=False)
    except OSError as error:
        raise ExportError(f"{target} cannot be written, it is as it was: {error}") from error


class _InvalidFileError(ExportError):
    """The exporter wrote what is not ONNX."""


def _write(
    program: torch.onnx.ONNXProgram, target: Path, opset: int | None, *, external: bool
) -> ExportReport:
    with workspace(target) as folder:
        written = folder / target.name
        program.save(written, external_data=external)
        name_by_content(written)
        report = _check(written, target)
        if opset is not None and report.opset != opset:
            raise ExportError(
                f"the exporter wrote opset {report.opset} instead of {opset}; "
                f"ask for {report.opset} or leave opset_version out"
            )
        move_into_place(written, target)
    return report


def _require_eval(model: nn.Module) -> None:
    found = training_modules(model)
    if found:
        names = ", ".join(repr(path) if path else "the model itself" for path in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise ExportError(
            f"in train mode: {names}{more}. The exporter would write them as if in eval mode; call "
            "model.eval() first"
        )


def _require_opset(version: int | None) -> None:
    newest = min(OPSETS[-1], onnx.defs.onnx_opset_version())
    if version is not None and not isinstance(version, int):
        raise ExportError(f"opset_version={version!r} is no integer")
    if version is not None and not OPSETS[0] <= version <= newest:
        raise ExportError(
            f"opset_version={version} cannot be written: the exporter supports {OPSETS[0]} to "
            f"{newest} and would change it silently"
        )


def _require_names(
    program: torch.onnx.ONNXProgram,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> None:
    """The exporter drops names that are too many, and takes a string for its letters."""
    graph = program.model.graph
    for what, names, values in (
        ("input", input_names, graph.inputs),
        ("output", output_names, graph.outputs),
    ):
        if names is not None and (isinstance(names, str) or len(names) > len(values)):
            raise ExportError(
                f"{what}_names={names!r} does not fit: the graph has {len(values)} {what}s "
                f"({', '.join(str(value.name) for value in values)}); give a list of one name each"
            )


def _least_opset(model: nn.Module) -> int | None:
    """The opset that a model needs; None where the exporter's default does."""
    state = (*model.parameters(), *model.buffers())
    return _BFLOAT16_OPSET if any(t.dtype is torch.bfloat16 for t in state) else None


def _refuse_link(given: Path, target: Path, *, external: bool) -> None:
    """Weights lie beside the file; a reader that comes through a link looks beside the link."""
    if external and given.is_symlink() and given.parent.resolve() != target.parent.resolve():
        raise ExportError(
            f"{given} is a link to {target}, in another folder, and the weights go to a file "
            "beside it, where a reader of the link does not look; give the real path"
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger tells errors alone inside."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


#: What torch.export says of a dataclass that it was not told of; the second is torch 2.11's.
_NOT_LOOKED_INTO = ("in output, which is not a known type", "unhashable type")


def _program(
    model: nn.Module,
    source: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """What torch exports of `source`, which is `model` or the program whose module that is."""
    if args and isinstance(args[-1], dict) and not options["kwargs"]:
        args = (*args, {})  # torch.onnx.export takes a last dict for keyword arguments
    try:
        with warnings.catch_warnings(), attributes_kept(model), _quiet(_REGISTRATION):
            # torch.export of torch 2.13 calls its own deprecated pytree test
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            # modes were looked at, and the module of an exported program cannot tell its own
            warnings.filterwarnings("ignore", message=".*while it is in training mode.*")
            # one name for the batch of several inputs is what is wanted
            warnings.filterwarnings("ignore", message=".*axis name.*will not be used.*")
            program = torch.onnx.export(
                _hooked(source), args, None, dynamo=True, verbose=False, **options
            )
    except Exception as error:  # the exporter and the user's forward raise anything
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps it in advice
            cause = cause.__cause__
        first = str(cause).strip().partition("\n")[0]
        if any(words in first for words in _NOT_LOOKED_INTO):
            kinds = _unknown_results(model, Example(args, options["kwargs"]))
            if kinds:
                with _registered(kinds):
                    return _program(model, source, args, **options)
        raise ExportError(
            f"torch.onnx.export failed on {type(model).__name__}: {first}. Check that "
            "torch.export.export(model, args, strict=False) works with these inputs"
        ) from error
    assert isinstance(program, torch.onnx.ONNXProgram)
    return program


def _hooked(source: nn.Module | ExportedProgram) -> nn.Module | ExportedProgram:
    """A module that calls `source` where its own hooks would be lost.

    The exporter interprets the nodes of a `torch.fx.GraphModule` and passes by the hooks on it.
    """
    if not isinstance(source, fx.GraphModule) or not has_hooks(source):
        return source
    caller = nn.Module()
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(caller)[name] = vars(source)[name]  # under the same names
    vars(caller)["forward"] = functools.wraps(source.forward)(partial(source))
    caller.training = source.training
    return caller


def _unknown_results(model: nn.Module, given: Example) -> list[type[Any]]:
    """The dataclasses in what the model returns that the exporter would not look into."""
    found: list[Any] = []
    queue = [outputs(clone(model), given)]
    while queue:
        value = queue.pop()
        kind: Any = type(value)
        if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
            found.append(kind)
            queue += [getattr(value, field.name) for field in dataclasses.fields(kind)]
        elif isinstance(value, Mapping | list | tuple):
            queue += value.values() if isinstance(value, Mapping) else value
    return list(dict.fromkeys(found))


@contextmanager
def _registered(kinds: list[type[Any]]) -> Iterator[None]:
    """Let the exporter look into these dataclasses while this is open."""
    try:
        for kind in kinds:
            pytree.register_dataclass(kind)
        yield
    finally:
        for kind in kinds:
            pytree._deregister_pytree_node(kind)


def _annotate(metadata: dict[str, str], model: nn.Module | ExportedProgram) -> None:
    metadata[VERSION] = __version__
    done = told(model)
    if isinstance(done, FoldReport):
        metadata[FOLDED] = json.dumps(sorted(done.provenance))
        metadata[OPTIONS] = json.dumps(done.options)


def _check(written: Path, target: Path) -> ExportReport:
    try:
        onnx.checker.check_model(str(written), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = f"the exporter wrote an invalid file for {target}: {error}"
        raise _InvalidFileError(said) from error
    model = onnx.load(str(written), load_external_data=False)
    counts = Counter(node.op_type for node in all_nodes(model))
    graph = model.graph
    return ExportReport(
        path=str(target),
        opset=opset_of(model),
        inputs={value.name: describe_type(value) for value in graph.input},
        outputs={value.name: describe_type(value) for value in graph.output},
        operators=dict(sorted(counts.items())),
        batch_norms_left=counts["BatchNormalization"],
        size=sum(path.stat().st_size for path in (written, *data_files(written))),
    )
