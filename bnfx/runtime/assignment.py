"""Which provider holds each node, and which nodes may lie elsewhere."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from bnfx.errors import ProviderError
from bnfx.onnx_files.reading import all_nodes, graphs_of, opset_of
from bnfx.onnx_files.retyping import BFLOAT16, float_types
from bnfx.runtime.providers import CPU, Where
from bnfx.runtime.sessions import SessionSettings, open_session

#: Operators that only ask for shapes, whatever they are given.
_SHAPES = {"Shape", "Size"}
#: Operators that may run on the CPU where they compute integers, as shapes are.
_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Equal", "Less", "Greater", "Where"),
    *("Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Range", "Identity"),
    *("Not", "And", "Or", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceSum", "ConstantOfShape"),
    *("Constant", "Expand", "Split", "Floor", "Ceil", "GreaterOrEqual", "LessOrEqual"),
    *("If", "Loop", "Scan"),  # the nodes inside are told, and judged, one by one
}
_WHOLE = {
    *(TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.INT8),
    *(TensorProto.UINT64, TensorProto.UINT32, TensorProto.UINT8, TensorProto.BOOL),
}
#: The last operator set whose kernels the other providers have, all but a few.
_WIDESPREAD = 20


@dataclass(frozen=True)
class PlacedNode:
    """A node of the graph that onnxruntime made, and the provider that it was given to."""

    provider: str
    #: Type, such as "Conv".
    operator: str
    name: str

    def __str__(self) -> str:
        return f"{self.operator} {self.name!r}"


@dataclass(frozen=True)
class Placed:
    """A session that runs where it was asked to."""

    session: Any
    #: Every node; those that one kernel fuses one by one.
    nodes: tuple[PlacedNode, ...]
    #: Those of them on the CPU, where that is allowed.
    strays: tuple[PlacedNode, ...]


def open_placed(
    model: str, where: Where, settings: SessionSettings, *, weights: str = ""
) -> Placed:
    """A session with every node on the provider, but for those that may lie elsewhere.

    Args:
        model: Path of the file.
        where: What was asked for.
        settings: How to open it.
        weights: Folder of the external data, where that is not the file's own.

    Raises:
        ProviderError: The provider cannot run the graph or a part of it, or nobody tells.
        VerificationError: onnxruntime cannot read or run the model.
    """
    source: str | bytes = Path(model).read_bytes() if weights else model
    how = dataclasses.replace(settings, weights=weights)
    try:
        session = open_session(source, where, how)
    except ProviderError as error:
        if "fallback" not in str(error).lower():
            raise ProviderError(f"{error}{_narrow(model)}") from error
        # Some nodes would run on the CPU: which, and whether they may, is looked at below.
        session = open_session(source, where, dataclasses.replace(how, strict=False))
    try:
        nodes = placed_nodes(session)
    except ProviderError:
        if not where.on_cpu:  # there is nowhere else that it could run
            raise
        nodes = ()
    return Placed(session, nodes, tuple(require_placed(nodes, where, model)))


def placed_nodes(session: Any) -> tuple[PlacedNode, ...]:
    """Every node of a session with its provider.

    Raises:
        ProviderError: This onnxruntime, or this provider, does not tell.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError) as error:
        raise ProviderError(
            "this onnxruntime does not tell which provider holds a node, so that nothing is proved "
            f"({error}); use 1.24 or later"
        ) from error
    return tuple(
        PlacedNode(str(part.ep_name), str(node.op_type), str(node.name))
        for part in parts
        for node in part.get_nodes()
    )


def nodes_by_provider(nodes: Iterable[PlacedNode]) -> dict[str, int]:
    """How many nodes each execution provider was given."""
    return dict(Counter(node.provider for node in nodes))


def require_placed(nodes: Sequence[PlacedNode], where: Where, model: str) -> list[PlacedNode]:
    """The nodes that lie on the CPU and may; no other lies off the provider.

    Raises:
        ProviderError: One does, or no node is known to lie on the provider.
    """
    strays = [node for node in nodes if node.provider != where.name]
    if not nodes and not where.on_cpu:
        raise ProviderError(
            f"{where.name} was asked for, and onnxruntime tells of no node of {model} that it holds"
        )
    allowed = _allowed(strays, where.allow_on_cpu, model)
    wrong = [node for node in strays if node not in allowed]
    if not wrong:
        return strays
    names = ", ".join(sorted({node.operator for node in wrong}))
    raise ProviderError(
        f"{where.name} was asked for, but these nodes run elsewhere: "
        f"{', '.join(map(str, wrong[:8]))}{' and more' if len(wrong) > 8 else ''}; move them into "
        f"operators that it has, allow them there (allow_on_cpu, for: {names}), or use "
        f"provider='cpu'{_newer(model)}{_narrow(model)}"
    )


def _newer(model: str) -> str:
    """A word on operator sets that providers come to later than the CPU."""
    opset = opset_of(onnx.load(model, load_external_data=False))
    if opset <= _WIDESPREAD:
        return ""
    return (
        f". The file has opset {opset}, of which providers lack kernels that they have of opset "
        f"{_WIDESPREAD}: try opset_version={_WIDESPREAD}"
    )


def _narrow(model: str) -> str:
    """A word on bfloat16, which few kernels take."""
    if BFLOAT16 not in float_types(onnx.load(model, load_external_data=False)):
        return ""
    return ". The file is in bfloat16, for which it lacks kernels: export it in float16 or float32"


def _allowed(
    strays: Sequence[PlacedNode], allow: Sequence[str] | None, model: str
) -> set[PlacedNode]:
    there = {node for node in strays if node.provider == CPU}
    if allow is not None:
        return {node for node in there if node.operator in allow}
    whole = whole_number_nodes(model) if there else set()
    return {node for node in there if is_shape_arithmetic(node, whole)}


def is_shape_arithmetic(node: PlacedNode, whole: set[str]) -> bool:
    """Whether a node asks for shapes, or computes whole numbers as shapes are computed.

    Args:
        node: The node.
        whole: What `whole_number_nodes` gives.
    """
    known = _key(node.name, node.operator) in whole
    return node.operator in _SHAPES or (node.operator in _ARITHMETIC and known)


def _key(name: str, operator: str) -> str:
    """What tells a node from others; those without a name of one operator count as one."""
    return name or f"({operator})"


def whole_number_nodes(model: str) -> set[str]:
    """Names of the nodes of a file whose results are all integers or booleans.

    A node without a name is known by its operator, in parentheses.
    """
    proto = onnx.load(model, load_external_data=False)
    try:
        proto = onnx.shape_inference.infer_shapes(proto)
    except (onnx.shape_inference.InferenceError, ValueError):
        return set()
    types = _types(proto)
    whole: dict[str, bool] = {}
    for node in all_nodes(proto):
        key = _key(node.name, node.op_type)
        is_whole = all(types.get(name) in _WHOLE for name in node.output if name)
        whole[key] = whole.get(key, True) and is_whole
    return {key for key, is_whole in whole.items() if is_whole}


def _types(proto: onnx.ModelProto) -> Mapping[str, int]:
    """Element types of values by name, in subgraphs too; a name with two types has none."""
    types: dict[str, int] = {}
    for graph, _ in graphs_of(proto):
        for value in (*graph.value_info, *graph.output):
            kind = value.type.tensor_type.elem_type
            types[value.name] = kind if types.get(value.name, kind) == kind else 0
    return types
