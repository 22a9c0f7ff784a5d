"""Operators that folding has no function for, as calls of a graph.

Nothing passes through them. Their shapes come from ONNX's own inference, asked for the one node at
the sizes at hand: what a file says of its values is a claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bnfx.numbers import Array
from bnfx.onnx_files.reading import inner_graphs
from bnfx.onnx_files.tensors import array_of, dtype_of, element_type, of_array

#: Constants of more elements than this say nothing about shapes.
_SMALL = 4096


@dataclass(frozen=True)
class Language:
    """What the nodes of a file are written in: versions of operator sets, and its functions."""

    opsets: tuple[onnx.OperatorSetIdProto, ...]
    functions: tuple[onnx.FunctionProto, ...]
    ir_version: int

    def version(self, domain: str) -> int:
        """Of an operator set; 0 where it is not imported."""
        return next((o.version for o in self.opsets if same_domain(o.domain, domain)), 0)


def same_domain(a: str, b: str) -> bool:
    """Whether two names mean one operator set; the standard one has two names."""
    return a == b or {a, b} == {"", "ai.onnx"}


class Foreign:
    """One node as a function of its inputs that are no constants, tensors or arrays.

    Real tensors are computed by onnx's reference, fake ones get the inferred shape and dtype.
    """

    #: What the node gave on an example: the shapes of its inputs, and of its outputs with dtypes.
    seen: tuple[list[tuple[int, ...]], list[tuple[tuple[int, ...], torch.dtype]]] | None = None

    def __init__(
        self,
        node: onnx.NodeProto,
        language: Language,
        constants: Mapping[str, Tensor],
        inputs: Sequence[str],
    ) -> None:
        self.node, self.language = node, language
        self.inputs = tuple(inputs)
        # as arrays: among fake tensors, what torch makes of a real one is fake
        self.constants = {name: array_of(value) for name, value in constants.items()}
        self.__name__ = self.__qualname__ = node.op_type
        self._inferred: dict[Any, Any] = {}

    def __call__(self, *values: Any) -> Any:
        """The output, or all outputs in a tuple where there are several."""
        if isinstance(torch.empty(()), FakeTensor):
            outs = self._fakes(values)
        else:
            outs = [of_array(array) for array in self.compute(values)]
        return outs[0] if len(outs) == 1 else tuple(outs)

    def compute(self, values: Sequence[Any]) -> list[Array]:
        """By onnx's reference; as wide as the widest floating-point input."""
        arrays = [array_of(v) if isinstance(v, Tensor) else np.asarray(v) for v in values]
        wide = np.result_type(np.float16, *(a.dtype for a in arrays if a.dtype.kind == "f"))
        arrays = [a.astype(wide) if a.dtype.kind == "f" else a for a in arrays]
        feeds = dict(zip(self.inputs, arrays, strict=True))
        small = {
            name: onnx.numpy_helper.from_array(a.astype(wide), name)
            for name, a in self.constants.items()
            if arrays and a.dtype.kind == "f" and a.size <= _SMALL
        }
        model = self._model({name: (a.dtype, a.shape) for name, a in feeds.items()}, small)
        large = {name: array for name, array in self.constants.items() if array.size > _SMALL}
        found: Any = ReferenceEvaluator(model).run(None, feeds | large)
        return [np.asarray(array) for array in found]

    def _fakes(self, values: Sequence[Any]) -> list[Any]:
        if any(isinstance(v, tuple | list) for v in values):
            raise ValueError(f"{self.node.op_type} reads a sequence")
        shapes = tuple(tuple(int(n) for n in v.shape) for v in values)
        key = (shapes, *(v.tobytes() for v in values if isinstance(v, np.ndarray)))
        if key not in self._inferred:
            self._inferred[key] = list(self._infer(values))
        found = self._inferred[key]
        if None in found and self.seen is not None and list(shapes) == self.seen[0]:
            found = self.seen[1]
        if None in found:
            raise ValueError(f"the shape that {self.node.op_type} gives is not known")
        return [torch.empty(shape, dtype=dtype) for shape, dtype in found]

    def _infer(self, values: Sequence[Any]) -> Iterator[tuple[tuple[int, ...], torch.dtype] | None]:
        typed, known = {}, {}
        for name, value in zip(self.inputs, values, strict=True):
            if isinstance(value, Tensor):
                typed[name] = (element_type(value.dtype), tuple(value.shape))
            else:
                known[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        model = self._model(typed, known)
        try:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except onnx.shape_inference.InferenceError:
            yield from (None for _ in model.graph.output)
            return
        for out in model.graph.output:
            if self._is_like_input(out.name):
                yield tuple(values[0].shape), values[0].dtype
                continue
            tensor = out.type.tensor_type
            dtype, dims = dtype_of(tensor.elem_type), tensor.shape.dim
            whole = tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims)
            yield (tuple(d.dim_value for d in dims), dtype) if whole and dtype is not None else None

    def _is_like_input(self, output: str) -> bool:
        """A BatchNormalization in training, of which onnx infers nothing."""
        node = self.node
        return (
            node.op_type == "BatchNormalization"
            and output == node.output[0]
            and self.inputs[:1] == tuple(node.input[:1])
        )

    def _model(
        self,
        typed: Mapping[str, tuple[Any, tuple[int, ...]]],
        known: Mapping[str, onnx.TensorProto] | None = None,
    ) -> onnx.ModelProto:
        """The node alone, its small constants inside."""
        stored = list((known or {}).values())
        inputs = []
        for name, values in self.constants.items():
            if values.size > _SMALL:
                typed = {**typed, name: (values.dtype, values.shape)}
            elif name not in (known or {}):
                stored.append(onnx.numpy_helper.from_array(values, name))
        for name, (kind, shape) in typed.items():
            elem = kind if isinstance(kind, int) else onnx.helper.np_dtype_to_tensor_dtype(kind)
            inputs.append(onnx.helper.make_tensor_value_info(name, elem, shape))
        outputs = [onnx.ValueInfoProto(name=name) for name in self.node.output if name]
        graph = onnx.helper.make_graph([self.node], "one", inputs, outputs, stored)
        return onnx.helper.make_model(
            graph,
            opset_imports=self.language.opsets,
            functions=self.language.functions,
            ir_version=self.language.ir_version,
        )


class Arithmetic(Foreign):
    """A node that computes with shapes: numpy arrays in and out, whatever the tensors are."""

    def __call__(self, *values: Any) -> Any:
        """The output, or all outputs in a tuple where there are several."""
        outs = self.compute(values)
        return outs[0] if len(outs) == 1 else tuple(outs)


def captured(node: onnx.NodeProto) -> list[str]:
    """Names of the outer values that the subgraphs of a node read, each once."""
    found: dict[str, None] = {}
    for _, graph in inner_graphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own |= {t.values.name for t in graph.sparse_initializer}
        read: list[str] = []
        for inner in graph.node:
            read += [name for name in (*inner.input, *captured(inner)) if name and name not in own]
            own.update(inner.output)
        read += [v.name for v in graph.output if v.name not in own]
        found.update(dict.fromkeys(read))
    return list(found)
