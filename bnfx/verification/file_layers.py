"""The layers of an ONNX file, with the weights that really reach each node.

A weight that is stored is read. One that is computed (renamed by an Identity, cast, transposed,
reshaped, built from constants) is taken from a run: what onnxruntime hands to the node is what
counts, not what a name says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from torch import Tensor

from bnfx.numbers import Array
from bnfx.onnx_files.reading import located_nodes, stored_tensors, tensor_array, type_name
from bnfx.verification.layers import Geometry, Kind, Layer, as_tensor

#: Position of each part among a node's inputs.
_CONV = {"weight": 1, "bias": 2}
_NORM = {"weight": 1, "bias": 2, "mean": 3, "var": 4}
_KINDS: Mapping[str, tuple[Kind, Mapping[str, int]]] = {
    "Conv": ("conv", _CONV),
    "ConvTranspose": ("conv_transpose", _CONV),
    "Gemm": ("linear", _CONV),
    "BatchNormalization": ("batch_norm", _NORM),
    "LayerNormalization": ("layer_norm", _CONV),
}
_LAYERS = {*_KINDS, "MatMul"}
_LARGE = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True)
class Node:
    """A node that is a layer, with the names of its operands."""

    #: The node.
    proto: onnx.NodeProto
    #: What it is.
    kind: Kind
    #: Part -> name of the value.
    operands: Mapping[str, str]
    #: Name of its input.
    x: str
    #: Name of its output, behind the Add of a bias where that is a node of its own.
    y: str
    #: Attribute -> value.
    settings: Mapping[str, object]


@dataclass(frozen=True)
class FileGraph:
    """What tier 1 and 2 need of a file."""

    #: Its layers, in order, of the main graph.
    nodes: tuple[Node, ...]
    #: Name -> stored tensor, of the main graph.
    stored: Mapping[str, onnx.TensorProto]
    #: Names of the values to compute: operands that are not stored, inputs and outputs of layers.
    wanted: tuple[str, ...]
    #: Where external data lies.
    folder: Path
    #: Every tensor that the file stores.
    tensors: tuple[onnx.TensorProto, ...]
    #: Name of a value -> the node that computes it, in the main graph.
    producers: Mapping[str, onnx.NodeProto]
    #: Layers inside subgraphs, which are not compared one by one.
    hidden: int


def layer_nodes(model: onnx.ModelProto, folder: Path) -> FileGraph:
    """Find the layers of a model whose functions have been inlined.

    Args:
        model: The model.
        folder: Where its external data lies.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                stored[node.output[0]] = attribute.t
    fixed = _fixed_values(model, set(stored))
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes = tuple(
        made
        for node in model.graph.node
        if (made := _layer_node(node, fixed, readers, stored)) is not None
    )
    wanted = {name for n in nodes for name in (n.x, n.y) if name not in stored}
    wanted |= {name for n in nodes for name in n.operands.values() if name not in stored}
    inputs = {value.name for value in model.graph.input}
    hidden = sum(
        found.where != "graph" and found.node.op_type in _LAYERS for found in located_nodes(model)
    )
    return FileGraph(
        nodes,
        stored,
        tuple(sorted(wanted - inputs)),
        folder,
        tuple(tensor for tensor, _ in stored_tensors(model)),
        {name: node for node in model.graph.node for name in node.output if name},
        hidden,
    )


def _fixed_values(model: onnx.ModelProto, stored: set[str]) -> set[str]:
    """Names of the values that no input of the graph reaches."""
    fixed = set(stored)
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            continue
        if all(name in fixed for name in node.input if name) and "Random" not in node.op_type:
            fixed.update(node.output)
    return fixed


def _layer_node(
    node: onnx.NodeProto,
    fixed: set[str],
    readers: Mapping[str, list[onnx.NodeProto]],
    stored: Mapping[str, onnx.TensorProto],
) -> Node | None:
    if node.domain not in ("", "ai.onnx") or not node.output:
        return None
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _KINDS:
        kind, places = _KINDS[node.op_type]
        operands = {
            part: node.input[i]
            for part, i in places.items()
            if len(node.input) > i and node.input[i]
        }
        if "weight" not in operands or (kind == "linear" and settings.get("transA")):
            return None
        return Node(node, kind, operands, node.input[0], node.output[0], settings)
    if node.op_type != "MatMul" or node.input[1] not in fixed:
        return None
    tensor = stored.get(node.input[1])
    if tensor is not None and len(tensor.dims) != 2:
        return None
    operands, y = {"weight": node.input[1]}, node.output[0]
    after = readers.get(y, [])
    if len(after) == 1 and after[0].op_type == "Add":
        (other,) = [name for name in after[0].input if name != y] or [""]
        if other in fixed:
            operands["bias"], y = other, after[0].output[0]
    return Node(node, "linear", operands, node.input[0], y, settings)


def file_layers(graph: FileGraph, values: Mapping[str, Array]) -> Iterator[Layer]:
    """The layers with their weights.

    Args:
        graph: As `layer_nodes` found it.
        values: Name -> what onnxruntime computed for it.
    """
    for node in graph.nodes:
        parts = {}
        for part, name in node.operands.items():
            if name in graph.stored:
                array = tensor_array(graph.stored[name], graph.folder)
            elif name in values:
                array = values[name]
            else:
                continue
            # Large weights stay as they are stored: in float64 they would take twice the file.
            held = part == "weight" and node.kind in _LARGE
            parts[part] = as_tensor(array) if held else as_tensor(array).double()
        layer = _made(node, parts)
        if layer is not None:
            yield replace(layer, rank=values[node.y].ndim if node.y in values else 0)


def stored_dtype(graph: FileGraph, name: str, values: Mapping[str, Array]) -> str:
    """Name of the dtype of an operand."""
    if name in graph.stored:
        return type_name(graph.stored[name].data_type)
    return str(values[name].dtype) if name in values else ""


def _made(node: Node, parts: dict[str, Tensor]) -> Layer | None:
    weight = parts.get("weight")
    if weight is None:
        return None
    geometry = None
    settings = node.settings
    if node.kind == "linear":
        if weight.dim() != 2:
            return None
        transposed = node.proto.op_type == "Gemm" and bool(settings.get("transB", 0))
        parts["weight"] = weight if transposed else weight.T
        if (alpha := _number(settings, "alpha", 1.0)) != 1:
            parts["weight"] = parts["weight"].double() * alpha
        if "bias" in parts:
            bias = parts["bias"] * _number(settings, "beta", 1.0)
            out = parts["weight"].shape[0]
            if bias.numel() not in (1, out):
                return None
            parts["bias"] = bias.reshape(-1).expand(out)
    elif node.kind in ("conv", "conv_transpose"):
        if weight.dim() < 3 or settings.get("output_shape"):
            return None
        geometry = _geometry(node, weight)
        if geometry is None:
            return None
    return Layer(
        kind=node.kind,
        name=node.proto.name or node.y,
        parts=parts,
        names=dict(node.operands),
        geometry=geometry,
        eps=_number(settings, "epsilon", 1e-5),
        axes=weight.dim(),
        training=bool(settings.get("training_mode", 0)),
        x=node.x,
        y=node.y,
        source=node.x,
    )


def _number(settings: Mapping[str, object], name: str, default: float) -> float:
    value = settings.get(name, default)
    return float(value) if isinstance(value, int | float) else default


def _integers(settings: Mapping[str, object], name: str, default: int, count: int) -> list[int]:
    value = settings.get(name)
    whole = [int(v) for v in value] if isinstance(value, list) else []
    return whole if len(whole) == count else [default] * count


def _geometry(node: Node, weight: Tensor) -> Geometry | None:
    """None where the padding depends on the size of the input."""
    settings, rank = node.settings, weight.dim() - 2
    automatic = settings.get("auto_pad", b"NOTSET")
    stride = _integers(settings, "strides", 1, rank)
    dilation = _integers(settings, "dilations", 1, rank)
    pads = _integers(settings, "pads", 0, 2 * rank)
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        if any(step != 1 for step in stride) or node.kind != "conv":
            return None
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        small = [n // 2 for n in total]
        large = [n - s for n, s in zip(total, small, strict=True)]
        pads = small + large if automatic == b"SAME_UPPER" else large + small
    elif automatic == b"VALID":
        pads = [0] * (2 * rank)
    added = _integers(settings, "output_padding", 0, rank)
    return Geometry(
        tuple(stride),
        tuple(pads[:rank]),
        tuple(pads[rank:]),
        tuple(dilation),
        int(_number(settings, "group", 1)),
        tuple(added) if node.kind == "conv_transpose" else (),
    )
