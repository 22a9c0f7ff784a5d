"""Values for the inputs of a file: floats at random, integers as far as the graph knows them.

A number that is looked up in a table lies within it, one that is a size is a small size, and one
that the graph compares with constants is one of those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from torch import Tensor

from bnfx.onnx_files.reading import located_nodes, tensor_array
from bnfx.onnx_files.tensors import dtype_of
from bnfx.operators.calls import words

_SIZE, _LARGE, _FEW = 2, 1 << 20, 8
#: Elements of an input that is not drawn any more.
LARGEST = 2**31
#: Operators whose results hold the numbers of their first input, or of all.
_MOVES = words(
    "Cast Concat Expand Flatten Gather Identity Pad Reshape Slice Split Squeeze Tile Transpose "
    "Unsqueeze Where"
)
_MOVED = {"Concat": range(_LARGE), "Where": (1, 2)}
#: Operators whose results have the shape of their first input.
_LIKE = words("Cast DequantizeLinear Dropout Identity QuantizeLinear")
#: Where an operator takes numbers as sizes.
_SIZES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Range": (1,),
    "Reshape": (1,),
    "Resize": (3,),
    "Tile": (1,),
    "TopK": (1,),
}
_RECURRENT = words("GRU LSTM RNN")


@dataclass
class _Known:
    """What the nodes say of one input."""

    low: int = 0
    high: int = _LARGE
    #: Constants that it is compared with.
    among: list[int] = field(default_factory=list)

    def within(self, low: int, high: int) -> None:
        """One more range that it lies in."""
        self.low, self.high = max(self.low, low), min(self.high, high)

    @property
    def values(self) -> tuple[int, int] | None:
        """The least and the largest; None where nothing is known, or nothing fits."""
        if self.high < _LARGE and self.low <= self.high:
            return self.low, self.high
        return (self.among[0], self.among[0]) if self.among else None


def ranges(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """The least and the largest number of inputs of integers, where the graph tells.

    Args:
        model: A model whose functions are inlined: those that are not are not looked into.
    """
    found = {
        value.name: _Known()
        for value in model.graph.input
        if (kind := dtype_of(value.type.tensor_type.elem_type)) is not None
        and not kind.is_floating_point
    }
    # Names that hold the numbers of an input, less a constant.
    held = {name: (name, 0) for name in found}
    shapes, constants = _shapes(model), _constants(model)
    for node in (located.node for located in located_nodes(model)):
        for at, name in enumerate(node.input):
            if name not in held:
                continue
            source, shift = held[name]
            low, high = _allowed(node, at, shapes)
            if high < _LARGE:
                found[source].within(low - shift, high - shift)
            other = constants.get(node.input[1 - at]) if len(node.input) == 2 else None
            if node.op_type == "Equal" and other is not None:
                found[source].among += [int(n) - shift for n in other]
            if node.op_type in _MOVES and at in _MOVED.get(node.op_type, (0,)):
                held |= dict.fromkeys(node.output, (source, shift))
            if node.op_type in ("Add", "Sub") and at == 0 and other is not None and len(other) == 1:
                moved = int(other[0]) * (1 if node.op_type == "Add" else -1)
                held[node.output[0]] = (source, shift + moved)
    return {name: known.values for name, known in found.items() if known.values is not None}


def _allowed(node: onnx.NodeProto, at: int, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """The range of numbers that a node takes as this operand; up to _LARGE if it takes any."""
    shape = shapes.get(node.input[0], ())
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if node.op_type in ("Gather", "GatherElements", "ScatterElements") and at == 1:
        inside = -len(shape) <= axis < len(shape)
        return (0, shape[axis] - 1) if inside and shape[axis] else (0, _LARGE)
    if node.op_type in ("GatherND", "ScatterND") and at == 1 and shape and min(shape) > 0:
        return 0, min(shape) - 1
    if node.op_type in _RECURRENT and at == 4:
        return 1, shape[0] if shape and shape[0] else _SIZE
    if at in _SIZES.get(node.op_type, ()):
        return _SIZE, _SIZE
    return 0, _LARGE


def _shapes(model: onnx.ModelProto) -> dict[str, Sequence[int]]:
    """Shapes as far as they are told; 0 for what is open."""
    graph = model.graph
    found: dict[str, Sequence[int]] = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
    }
    found |= {name: tensor.dims for name, tensor in _tensors(model)}
    for node in graph.node:
        if node.op_type in _LIKE and node.input[0] in found:
            found.setdefault(node.output[0], found[node.input[0]])
    return found


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    for node in (located.node for located in located_nodes(model)):
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                yield node.output[0], attribute.t


def _constants(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Stored integers, where they are few."""
    arrays = (
        (name, tensor_array(tensor, Path()))
        for name, tensor in _tensors(model)
        if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        and tensor.data_location != onnx.TensorProto.EXTERNAL
        and math.prod(tensor.dims) <= _FEW
    )
    return {name: array.reshape(-1).tolist() for name, array in arrays}


def drawn(
    kind: torch.dtype, shape: Sequence[int], known: tuple[int, int] | None, source: torch.Generator
) -> Tensor:
    """A value for an input.

    Args:
        kind: Its dtype.
        shape: Its shape.
        known: The least and the largest integer; both are there where they find room.
        source: Where the numbers come from.
    """
    if kind.is_floating_point:
        return torch.randn(shape, generator=source).to(kind)
    if known is None:
        # Images and quantised values take all of a byte; other integers are flags more often.
        bytes_ = kind in (torch.uint8, torch.int8)
        known = (torch.iinfo(kind).min, torch.iinfo(kind).max) if bytes_ else (0, 1)
    values = torch.randint(known[0], known[1] + 1, tuple(shape), generator=source)
    if values.numel() > 1:
        values.view(-1)[:2] = torch.tensor(known)
    return values.to(kind)
