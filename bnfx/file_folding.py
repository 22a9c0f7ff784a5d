"""`fold_onnx`: fold the BatchNorms of an ONNX file that anyone wrote."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Group, RenderableType
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.errors import FoldError, VerificationError
from bnfx.folding import fold_captured
from bnfx.gauges.walk import FoldOptions
from bnfx.graphs.inference import Captured
from bnfx.graphs.mapped import mapped_into
from bnfx.graphs.shapes import UNKNOWN, shapes_of
from bnfx.onnx_files.drawing import LARGEST, drawn, ranges
from bnfx.onnx_files.importing import Imported, imported
from bnfx.onnx_files.node_call import VALUE, unescaped
from bnfx.onnx_files.placing import move_into_place, real_target
from bnfx.onnx_files.reading import describe_type, located_nodes, opset_of, read_onnx
from bnfx.onnx_files.rebuilding import rebuilt
from bnfx.onnx_files.sizes import SPACE, Axes, axes_of, filled, open_axes, varied
from bnfx.onnx_files.storing import is_beside, store
from bnfx.onnx_files.tensors import dtype_of, tensor_of
from bnfx.reports.document import Headline
from bnfx.reports.report import FoldRecord, FoldReport, Report, report, table, tally
from bnfx.verification.staging import inlined
from bnfx.verification.verdicts import VerifyReport
from bnfx.verify import verify_onnx
from bnfx.workspace import workspace

#: The oldest operator set whose sums and products broadcast as they do today.
_OLDEST = 7
#: So many sizes that all leave something unknown: it is not for the sizes.
_TRIES = 4


@dataclass(frozen=True)
class FoldOnnxReport(Report):
    """What was done to a file."""

    heading = "Folding of the file"
    #: The file that was read.
    source: str
    #: The file that was written.
    path: str
    #: One record for every BatchNormalization, in the order of the file.
    batch_norms: tuple[FoldRecord, ...]
    #: Nodes that are gone, by name (by output, where a name is missing or not the only one).
    removed: tuple[str, ...]
    #: Nodes and tensors that are new.
    added: tuple[str, ...]
    #: Tensors that have new values.
    changed: tuple[str, ...]
    #: The comparison with the file as it was; None if not asked for.
    verification: VerifyReport | None
    #: Wall-clock time.
    seconds: float

    def __bool__(self) -> bool:
        return bool(self.verification)

    @property
    def folded(self) -> int:
        """How many BatchNormalizations are gone."""
        return sum(bn.verdict == "folded" for bn in self.batch_norms)

    def headline(self) -> Headline:
        """How many BatchNormalizations are gone, and whether that was verified."""
        facts = (("verdicts", tally(bn.verdict for bn in self.batch_norms)),)
        verdict = f"{self.folded} of {len(self.batch_norms)} BatchNormalizations folded."
        if (others := len(self.removed) - self.folded) > 0:
            verdict = f"{verdict[:-1]}, {others} other nodes gone."
        title = f"bnfx: fold {self.source}"
        if self.verification is None:
            return Headline(title, "warning", f"{verdict} The file was not verified.", facts)
        found = self.verification.headline()
        return Headline(title, found.status, f"{verdict} {found.verdict}", (*facts, *found.facts))

    def __rich__(self) -> RenderableType:
        title = f"fold_onnx: {tally(bn.verdict for bn in self.batch_norms)}. {self.path}"
        rows = (
            (bn.path, bn.verdict, ", ".join(bn.into) or "-", bn.reason or "-")
            for bn in self.batch_norms
        )
        parts: list[RenderableType] = [
            table(title, ("BatchNormalization", "verdict", "into", "reason"), rows)
        ]
        changes = (
            (kind, name) for kind in ("removed", "added", "changed") for name in getattr(self, kind)
        )
        parts.append(table("What changed in the file:", ("", "name"), changes))
        parts += [self.verification] if self.verification is not None else []
        return Group(*parts)


def fold_onnx(
    f: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    args: Any = None,
    thresholds: bool = False,
    border_maps: bool = False,
    merge_branches: bool = True,
    merge_linear: bool = True,
    block: int = 16,
    verify: bool = True,
    verify_options: Mapping[str, Any] | None = None,
    max_batch_norms_left: int | None = None,
    fix_defaults: bool = False,
) -> FoldOnnxReport:
    """Fold every BatchNormalization of a file that an exact rewrite can remove.

    The rules and the algebra are those of `fold_bn`. The file stays the file: constants change,
    BatchNormalizations vanish, and so do sums and products with constants that layers can take up;
    a bias comes where one is needed; branches that are merged become one node. Names of inputs,
    outputs and of all nodes that are left, versions, metadata, functions and subgraphs stay. What
    no rule knows, custom operators, quantised layers and what subgraphs read among it, stays as it
    is.

    Args:
        f: The file; external data lies beside it.
        out: Where the result goes, which may be `f`. A file there stays as it is unless every check
            passes.
        args: Example inputs in the order of the file's, as a tuple or by name. Needed where sizes
            that the file leaves open can't be guessed.
        thresholds: As in `fold_bn`: a Relu or Clip may become a Max and a Min with a bound for each
            channel.
        border_maps: As in `fold_bn`: a convolution that pads zeros may get a constant map added.
            The sizes of images must be fixed, or given by `args` and never others.
        merge_branches: As in `fold_bn`.
        merge_linear: As in `fold_bn`.
        block: As in `fold_bn`.
        verify: Whether to compare the result with `f` before it is moved into place.
        verify_options: Options of `verify_onnx`, such as `{"provider": "cuda"}`.
        fix_defaults: Whether values that the file has for its inputs, which a caller may override
            since IR version 4, become constants, and these inputs go. PyTorch 1.2 listed all of
            its weights as such inputs.
        max_batch_norms_left: How many BatchNormalizations may stay; where more do, nothing is
            written.

    Raises:
        VerificationError: `f` cannot be read; or the result does not compute what `f` computes, and
            `.report` of the error is the `FoldOnnxReport`; or more BatchNormalizations stay than
            may: the `FoldReport`.
        FoldError: The operator set is older than 7; `args` don't fit; a map has no fixed size.
        ExportError: `out` cannot be written.
    """
    start = time.perf_counter()
    source, target = Path(f), real_target(out)
    model = read_onnx(source)
    if opset_of(model) and opset_of(model) < _OLDEST:
        raise FoldError(
            f"{source} has operator set {opset_of(model)}, in which sums do not broadcast; convert "
            f"it first: onnx.version_converter.convert_version(model, {_OLDEST})"
        )
    if fix_defaults:
        stored = {tensor.name for tensor in model.graph.initializer}
        for value in [v for v in model.graph.input if v.name in stored and model.ir_version > 3]:
            model.graph.input.remove(value)
    names = list(_norms(model))
    read = imported(model, source.parent.resolve())
    example = _Example.of(source, model, read, args)
    if border_maps and example.is_open and args is None:
        raise FoldError(
            f"border_maps=True adds maps of one size, and {source} leaves {example.words} open; "
            "pass args of the size that it will have"
        )
    if 0 < opset_of(model) < 8 and thresholds:
        raise FoldError(f"thresholds=True needs operator set 8, {source} has {opset_of(model)}")
    options = FoldOptions(
        merge_branches=merge_branches,
        thresholds=thresholds,
        border_maps=border_maps,
        merge_linear=merge_linear,
        block=block,
    )
    with workspace(target) as folder, mapped_into(folder):
        folded = fold_captured(example.captured(read), options)
        told = report(folded)
        assert isinstance(told, FoldReport)
        beside = is_beside(model)
        done = rebuilt(model, read, folded)
        records = tuple(_records(names, read, told, done.removed))
        left = sum(bn.verdict != "folded" for bn in records)
        if max_batch_norms_left is not None and left > max_batch_norms_left:
            raise VerificationError(
                f"{target} was not written: {left} BatchNormalizations stay, and at most "
                f"{max_batch_norms_left} may. An older file is as it was",
                replace(told, batch_norms=records),
            )
        written = folder / target.name
        store(model, done.tensors, source, written, beside=beside)
        _check(written, source)
        changed = (*done.changed, *done.added, *done.removed)
        verified = _verified(source, written, example, changed, verify_options) if verify else None
        result = FoldOnnxReport(
            source=str(source),
            path=str(target),
            batch_norms=records,
            removed=tuple(done.removed),
            added=tuple(done.added),
            changed=tuple(done.changed),
            verification=verified and replace(verified, path=str(target)),
            seconds=time.perf_counter() - start,
        )
        if verified is not None and not verified and (changed or verified.status == "failed"):
            raise VerificationError(
                f"{target} was not written: {verified.first_divergence}. An older file is as it "
                "was",
                result,
            )
        move_into_place(written, target)
    return result


def _verified(
    source: Path,
    written: Path,
    example: _Example,
    changed: Sequence[str],
    options: Mapping[str, Any] | None,
) -> VerifyReport | None:
    """The comparison; None where there is no way to compare, and no need, since nothing changed."""
    given = dict(options or {})
    try:
        return verify_onnx(source, written, example.drawn(), rewritten=changed, **given)
    except VerificationError as error:
        alone = example.alone()
        if alone != example:  # a state of one row may stand beside an open batch
            return _verified(source, written, alone, changed, {"batch_sizes": (), **given})
        if not changed:
            return None
        raise VerificationError(
            f"{source} was folded, and the result could not be verified, so that nothing was "
            f"written: {error}; pass args that {source} takes, or verify=False"
        ) from error


def _check(written: Path, source: Path) -> None:
    """A valid file stays one; what onnx's checker refused before, it may refuse again."""
    found = _invalid(written)
    if found and not _invalid(source):
        raise FoldError(f"the result is no valid ONNX file, please report it: {found}")


def _invalid(f: Path) -> str:
    """What onnx's checker says against a file."""
    try:
        onnx.checker.check_model(str(f))
    except onnx.checker.ValidationError as error:
        return str(error)
    return ""


# -- example inputs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Example:
    """Shapes of the inputs, and values where they were given."""

    #: Names and types of the inputs, for messages.
    inputs: tuple[str, ...]
    #: None where the rank of an input is unknown.
    axes: tuple[Axes | None, ...]
    #: Sizes of what is open.
    sizes: Mapping[str, int]
    #: Names of what is open, and whether that is a batch.
    names: Mapping[str, bool]
    #: One for each input.
    given: tuple[Tensor, ...] | None
    #: Inputs that need no value, since the file has one.
    optional: frozenset[str]
    #: The least and the largest integer of inputs, where the graph tells.
    known: Mapping[str, tuple[int, int]]

    @staticmethod
    def of(source: Path, model: onnx.ModelProto, read: Imported, args: Any) -> _Example:
        """The example given, or the first sizes that fit."""
        axes = tuple(axes_of(value, _channels(read, at)) for at, value in enumerate(read.inputs))
        names = open_axes([a for a in axes if a is not None])
        inputs = tuple(f"input {value.name!r}, {describe_type(value)}" for value in read.inputs)
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        optional = frozenset(value.name for value in read.inputs if value.name in stored)
        if args is not None:
            defaults = {name: tensor_of(stored[name], source.parent) for name in optional}
            given = _given(source, read, args, defaults)
            sizes = _sizes_in(source, axes, given)
            return _Example(inputs, axes, sizes, names, given, optional, {})
        known = ranges(inlined(model, source))
        best = _Example(inputs, axes, filled(names, SPACE[0]), names, None, optional, known)
        least, first = best.failures(read), best.sizes
        for tried, space in enumerate(SPACE[1:], 1):
            if not least or not names or (tried >= _TRIES and best.sizes == first):
                break
            other = replace(best, sizes=filled(names, space))
            if (failures := other.failures(read)) < least:
                least, best = failures, other
        return best

    def failures(self, read: Imported) -> int:
        """How many calls don't run at these sizes."""
        return len(shapes_of(read.module, self.shapes(self.sizes), ())[0].failures)

    def alone(self) -> _Example:
        """With a batch of one, where the batch is open and not given."""
        if self.given is not None:
            return self
        batches = {name: 1 for name, batch in self.names.items() if batch}
        return replace(self, sizes={**self.sizes, **batches})

    @property
    def is_open(self) -> bool:
        """Whether sizes other than the batch are open."""
        return any(not batch for batch in self.names.values())

    @property
    def words(self) -> str:
        """The open sizes."""
        return ", ".join(name for name, batch in self.names.items() if not batch)

    def shapes(self, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """Tensors without values, for each input."""
        return tuple(
            UNKNOWN
            if axes is None or dtype_of(axes.elem_type) is None
            else torch.empty(axes.filled(sizes), dtype=dtype_of(axes.elem_type), device="meta")
            for axes in self.axes
        )

    def captured(self, read: Imported) -> Captured:
        """The graph, with the example's shapes and others that it takes."""
        if self.given is not None:
            inputs: tuple[Any, ...] = tuple(v.to("meta") for v in self.given)
        else:
            inputs = self.shapes(self.sizes)
        others = tuple(self.shapes(sizes) for sizes in varied(self.names, self.sizes))
        return Captured(read.module, inputs, others)

    def drawn(self) -> tuple[Tensor, ...]:
        """Values for each input that needs one."""
        needed = [axes is None or axes.name not in self.optional for axes in self.axes]
        if self.given is not None:
            return tuple(itertools.compress(self.given, needed))
        generator = torch.Generator().manual_seed(0)
        found = []
        for name, axes in itertools.compress(zip(self.inputs, self.axes, strict=True), needed):
            kind = dtype_of(axes.elem_type) if axes is not None else None
            shape = () if axes is None else axes.filled(self.sizes)
            if axes is None or kind is None or math.prod(shape) >= LARGEST:
                raise FoldError(f"no example can be drawn for {name}; pass args, or verify=False")
            found.append(drawn(kind, shape, self.known.get(axes.name), generator))
        return tuple(found)


def _channels(read: Imported, at: int) -> dict[int, int]:
    """The channels of an input, where a convolution reads it."""
    placeholder = read.module.graph.find_nodes(op="placeholder")[at]
    for user in placeholder.users:
        weight = user.kwargs.get("weight")
        if getattr(user.target, "__name__", "") in ("conv1d", "conv2d", "conv3d"):
            value = read.module.get_parameter(str(weight.target))
            return {1: value.shape[1] * int(user.kwargs["groups"])}
    return {}


def _given(
    source: Path, read: Imported, args: Any, defaults: Mapping[str, Tensor | None]
) -> tuple[Tensor, ...]:
    """The example in the order of the inputs, with the file's own values of those that have one."""
    names = [value.name for value in read.inputs if value.name not in defaults]
    if isinstance(args, Mapping):
        missing = [name for name in names if name not in args]
        if missing:
            raise FoldError(f"args have no {', '.join(missing)}, which {source} takes")
        args = [args[name] for name in names]
    leaves = args if isinstance(args, Sequence) else [args]
    found = tuple(torch.as_tensor(leaf) for leaf in pytree.tree_leaves(list(leaves)))
    if len(found) != len(names):
        raise FoldError(
            f"{source} takes {len(names)} inputs ({', '.join(names)}), args have {len(found)}"
        )
    values = {**defaults, **dict(zip(names, found, strict=True))}
    return tuple(
        torch.empty(0) if (value := values[entry.name]) is None else value for entry in read.inputs
    )


def _sizes_in(
    source: Path, inputs: Sequence[Axes | None], given: Sequence[Tensor]
) -> dict[str, int]:
    """What an example says of the open sizes."""
    found: dict[str, int] = {}
    for axes, value in zip(inputs, given, strict=True):
        if axes is None:
            continue
        shape = tuple(value.shape)
        fits = len(shape) == len(axes.sizes) and all(
            found.setdefault(size, n) == n if isinstance(size, str) else size == n
            for size, n in zip(axes.sizes, shape, strict=True)
        )
        if not fits or value.dtype is not dtype_of(axes.elem_type):
            raise FoldError(
                f"input {axes.name!r} of {source} is {dtype_of(axes.elem_type)} "
                f"{list(axes.sizes)}; args have {value.dtype} {list(shape)}"
            )
    return found


# -- records ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """One BatchNormalization of the file."""

    #: Its place in the main graph; None inside a subgraph or a function.
    index: int | None
    name: str
    where: str
    parameters: tuple[str, ...]


_OVERRIDDEN = (
    "{0!r} is an input of the file, so that a caller may give another; pass fix_defaults=True if "
    "the file has a value for it that is always meant"
)


def _norms(model: onnx.ModelProto) -> Iterator[_Norm]:
    index = -1
    for found in located_nodes(model):
        index += found.where == "graph"
        if found.node.op_type == "BatchNormalization":
            inside = None if found.where != "graph" else index
            node = found.node
            name, parameters = node.name or node.output[0], tuple(node.input[1:])
            yield _Norm(inside, name, found.where, parameters)


def _records(
    names: Sequence[_Norm], read: Imported, told: FoldReport, gone: Sequence[str]
) -> Iterator[FoldRecord]:
    """What became of every BatchNormalization."""
    known = {unescaped(record.path): record for record in told.batch_norms}
    given = {value.name for value in read.inputs}
    inputs = {f"input {n.name!r}": f"input {n.meta[VALUE]!r}"
              for n in read.module.graph.find_nodes(op="placeholder")}  # fmt: skip
    for norm in names:
        if norm.index is None:
            why = f"it lies in {norm.where}, which is not entered; inline it first"
            yield FoldRecord(norm.name, "kept", (), why)
            continue
        title = read.titles[norm.index]
        if norm.index in read.refused and unescaped(title) in gone:
            yield FoldRecord(title, "folded", (), "nothing reads its output")
        elif norm.index in read.refused:
            yield FoldRecord(title, "kept", (), read.refused[norm.index])
        elif title in known and known[title].verdict != "folded" and given & {*norm.parameters}:
            yield FoldRecord(title, "kept", (), _OVERRIDDEN.format(*given & {*norm.parameters}))
        elif title in known:
            yield _in_words_of_the_file(known[title], title, inputs)
        else:
            yield FoldRecord(title, "kept", (), "it computes from constants alone")


def _in_words_of_the_file(record: FoldRecord, title: str, inputs: Mapping[str, str]) -> FoldRecord:
    into = tuple(unescaped(name.removesuffix(".merged")) for name in record.into)
    reason = unescaped(record.reason).replace("example_inputs", "args")
    for ours, own in inputs.items():
        reason = reason.replace(ours, own)
    return replace(record, path=title, into=into, reason=reason)
