"""An ONNX file as the reference: evaluated in float64, its layers taken as they are.

The graph is widened to float64 and evaluated by onnx's own reference implementation; convolutions
and pooling, which are slow there, by torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.utils import _pytree as pytree

from bnfx.errors import VerificationError
from bnfx.graphs.examples import Example
from bnfx.numbers import Array, relative_error
from bnfx.onnx_files.drawing import LARGEST, drawn, ranges
from bnfx.onnx_files.importing import imported
from bnfx.onnx_files.reading import (
    all_nodes,
    describe_type,
    read_onnx,
    tensor_array,
    type_name,
)
from bnfx.onnx_files.retyping import BFLOAT16, DOUBLE, FLOAT, HALF, float_types, retyped
from bnfx.onnx_files.tensors import any_dtype
from bnfx.operators.calls import words
from bnfx.runtime.isolated import execute_apart
from bnfx.runtime.runner import Answer, Request, execute
from bnfx.verification.file_kernels import kernels_of
from bnfx.verification.file_layers import file_layers
from bnfx.verification.file_operators import OPERATORS
from bnfx.verification.layers import as_tensor, composed, samples
from bnfx.verification.outputs import parting
from bnfx.verification.references import (
    COMPOSED,
    Form,
    Precision,
    Tf32,
    arrays,
    require_same,
    strict_float32,
    to_tf32,
    to_tf32_truncated,
)
from bnfx.verification.samples import RowTruths, Runs
from bnfx.verification.staging import inlined, stage
from bnfx.verification.torch_layers import Constant, Traced
from bnfx.workspace import workspace

_NAMES: Mapping[int, Precision] = {BFLOAT16: "bf16", HALF: "fp16"}
#: Largest error of a sound file; beyond it, what float64 evaluates is another function.
_SOUND = {"fp32": 1e-3, "tf32": 0.03, "fp16": 0.03, "bf16": 0.25}
_FOLDABLE = words("Add BatchNormalization Div Mul Sub Sum")
#: Two runs of a sound file in float32, in other orders of their sums.
_ALIKE = 1e-4
_ORDER: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "bf16")


def file_precision(model: onnx.ModelProto, precision: Precision) -> Precision:
    """The coarser one of the precision asked for and that of the file itself."""
    types = float_types(model)
    own: Precision = next((_NAMES[t] for t in (BFLOAT16, HALF) if t in types), "fp32")
    return max(own, precision, key=_ORDER.index)


def _like(one: Array, other: Array) -> bool:
    """Whether two runs in float32 are of one function."""
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and relative_error([one], [other.astype(np.float64)]) <= _ALIKE


class OnnxReference:
    """A file that another file is compared with."""

    def __init__(
        self, path: Path, precision: Precision, timeout: float, *, isolate: bool = True
    ) -> None:
        self.name = str(path)
        self.path, self.timeout, self.isolate = path, timeout, isolate
        self.proto = read_onnx(path)
        own = file_precision(self.proto, "fp32")
        self.precision = file_precision(self.proto, precision)
        self.weights = {"bf16": "bfloat16", "fp16": "float16"}.get(own, "float32")
        stored = {tensor.name for tensor in self.proto.graph.initializer}
        self.inputs = [v for v in self.proto.graph.input if v.name not in stored]
        # Where something can fold or merge into layers, other weights are as right.
        self.decides = not any(node.op_type in _FOLDABLE for node in all_nodes(self.proto))
        self.sound = _SOUND[self.precision]
        self.failures: list[str] = []

    def example(self) -> Example:
        """An input drawn by what the file says; every symbolic size is 2.

        Raises:
            VerificationError: An input is no tensor, or claims more than 2^31 elements.
        """
        generator = torch.Generator().manual_seed(0)
        known = ranges(inlined(self.proto, self.path))
        found = []
        for value in self.inputs:
            kind = any_dtype(value.type.tensor_type.elem_type)
            shape = [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
            if kind is None or math.prod(shape) >= LARGEST:
                raise VerificationError(
                    f"no example can be drawn for input {value.name!r} of {self.name}, "
                    f"{describe_type(value)}; give args"
                )
            found.append(drawn(kind, shape, known.get(value.name), generator))
        return Example(tuple(found), {})

    def leaves(self, sample: Example) -> list[Tensor]:
        """The tensors of an input in the order of the file's inputs; by name where it has names."""
        if sample.kwargs and not sample.args:
            missing = [v.name for v in self.inputs if v.name not in sample.kwargs]
            if not missing:
                return [torch.as_tensor(sample.kwargs[v.name]) for v in self.inputs]
        leaves = pytree.tree_leaves((sample.args, dict(sample.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(self, given: Sequence[Example], known: RowTruths | None = None) -> Runs:
        """Outputs as onnxruntime computes them, and in float64.

        Args:
            given: The inputs.
            known: What they are in float64, as far as earlier runs tell.

        Raises:
            VerificationError: The reference cannot be run on an input.
        """
        if not given:
            return Runs([], [], [], ())
        answer = self._answer(given, values=False)
        failed = next(iter(answer.failures.values()), None)
        if failed is not None:
            raise VerificationError(
                f"onnxruntime cannot run the reference {self.name}: {failed}; give args and inputs "
                "that it runs on"
            )
        own = [outs or [] for outs in answer.results]
        outputs = self.proto.graph.output
        declared = tuple(type_name(value.type.tensor_type.elem_type) for value in outputs)
        exact = []
        for i, sample in enumerate(given):
            truth = known.of(i, own[i]) if known is not None else None
            if truth is None:
                found = self._exactly(sample)
                truth = [np.asarray(found[value.name]) for value in outputs]
            exact.append(truth)
        runs = Runs(own, own, exact, declared)
        return replace(runs, rounded=self._in_tf32(given, runs, to_tf32))

    def truncated(self, given: Sequence[Example], runs: Runs) -> list[list[Array]]:
        """As `TorchReference` has it."""
        return self._in_tf32(given, runs, to_tf32_truncated)

    def _in_tf32(
        self, given: Sequence[Example], runs: Runs, narrow: Callable[[Tensor], Tensor]
    ) -> list[list[Array]]:
        """Outputs with factors in TF32, as far as torch has the operators; else in float32."""
        if self.precision != "tf32":
            return runs.rounded
        read = imported(inlined(self.proto, self.path), self.path.parent.resolve())
        if read.outputs != tuple(value.name for value in self.proto.graph.output):
            return runs.own
        found: list[list[Array]] = []
        for i, sample in enumerate(given):
            leaves = self.leaves(sample)
            try:
                with torch.no_grad(), strict_float32():
                    plain = arrays(read.module(*leaves))
                    with Tf32(narrow):
                        found.append(arrays(read.module(*leaves)))
            except (RuntimeError, TypeError, ValueError, IndexError, VerificationError):
                return runs.own
            # A graph that does not compute what the file does has no say in its budget.
            if not all(map(_like, plain, runs.own[i])):
                return runs.own
        return found

    def require_one_answer(self, sample: Example, runs: Runs) -> None:
        """Refuse a file that computes something else each time, as `TorchReference` does.

        Raises:
            VerificationError: The same input gives other outputs.
        """
        again = self._answer([sample], values=False).results[0] or []
        require_same(self.name, runs, again)

    def release(self) -> None:
        """Give back the memory of the copy in float64."""
        self.__dict__.pop("_evaluator", None)

    def parting(self, sample: Example) -> str:
        """The first operator that computes something else in float64; "" where none does."""
        model = inlined(self.proto, self.path)
        names = [name for node in model.graph.node for name in node.output if name]
        try:
            ours = self._answer([sample], values=True, shown=names).values
            exact = self._exactly(sample)
        except VerificationError:
            return ""
        for node in model.graph.node:
            for name in (name for name in node.output if name in ours and name in exact):
                if parting([ours[name]], [np.asarray(exact[name])], self.sound):
                    return f"{node.op_type} {node.name or name!r}"
        return ""

    @functools.cached_property
    def _evaluator(self) -> ReferenceEvaluator:
        wide = retyped(
            inlined(self.proto, self.path), self.path.parent, {FLOAT, HALF, BFLOAT16}, DOUBLE
        )
        for named in (*wide.opset_import, *all_nodes(wide)):  # one domain by two names
            named.domain = "" if named.domain == "ai.onnx" else named.domain
        return ReferenceEvaluator(wide, new_ops=[*OPERATORS, *kernels_of(wide)])

    def _exactly(self, sample: Example) -> Mapping[str, Any]:
        """All of its values in float64."""
        feed = {
            value.name: array.astype(np.float64) if array.dtype.kind == "f" else array
            for value, array in zip(self.inputs, arrays(self.leaves(sample)), strict=True)
        }
        try:
            with np.errstate(all="ignore"):
                return dict(self._evaluator.run(None, feed, intermediate=True))
        except Exception as error:  # onnx's reference raises anything
            raise VerificationError(
                f"the reference {self.name} cannot be evaluated in float64: "
                f"{type(error).__name__}: {str(error.__cause__ or error).partition(chr(10))[0]}. "
                "Verify against the torch module that the file was made from"
            ) from error

    def _answer(
        self, given: Sequence[Example], *, values: bool, shown: Sequence[str] | None = None
    ) -> Answer:
        with workspace() as folder:
            staged = stage(self.proto, self.path, folder, on_cpu=True, values=values)
            request = Request(
                model=staged.model,
                provider="cpu",
                folder=str(folder),
                names=tuple(value.name for value in self.inputs),
                runs=len(given),
                values_model=staged.values_model,
                values=tuple(staged.graph.wanted if shown is None else shown) if values else (),
                weights=staged.weights,
            )
            feeds = [self._feed(sample) for sample in given]
            if not self.isolate:
                return execute(request, feeds)
            return execute_apart(request, feeds, timeout=self.timeout)

    def _feed(self, sample: Example) -> list[Array]:
        wanted = [type_name(value.type.tensor_type.elem_type) for value in self.inputs]
        return [
            array.astype(kind) if array.dtype.kind == "f" and kind.startswith("float") else array
            for array, kind in zip(arrays(self.leaves(sample)), wanted, strict=True)
        ]

    def forms(self, sample: Example) -> Iterator[Form]:
        """The file's layers, with each BatchNorm in the layer before it, and as they are."""
        answer = self._answer([sample], values=True)
        with workspace() as folder:
            graph = stage(self.proto, self.path, folder, on_cpu=True, values=False).graph
        values = dict(answer.values)
        values |= {v.name: a for v, a in zip(self.inputs, self._feed(sample), strict=True)}
        layers = tuple(file_layers(graph, values))
        flow = {name: samples(as_tensor(array)) for name, array in values.items()}
        used = {name for layer in layers for name in layer.names.values()}
        constants = tuple(
            Constant(tensor.name, _constant(tensor_array(tensor, graph.folder)), untouched=True)
            for tensor in graph.tensors
            if tensor.name not in used and tensor.data_type != onnx.TensorProto.STRING
        )
        yield Form(COMPOSED, _traced(layers, constants, flow), rounded_once=False)
        yield Form("as it is", Traced(layers, constants, flow), rounded_once=False)

    def unfolded(self, sample: Example) -> Traced:
        """The layers as they are."""
        return list(self.forms(sample))[-1].traced


def _traced(
    layers: Sequence[Any], constants: tuple[Constant, ...], flow: Mapping[str, Tensor]
) -> Traced:
    return Traced(tuple(composed(layers)), constants, flow)


def _constant(array: Array) -> Tensor:
    value = as_tensor(array)
    return value.double() if value.is_floating_point() else value
