"""ONNX files as they lie on disk: reading them, walking their nodes, saying what is in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from bnfx.errors import VerificationError

#: Key of the file's metadata under which the names of folded parameters stand.
FOLDED = "bnfx.folded"
#: Key of the file's metadata under which the version of bnfx stands.
VERSION = "bnfx.version"


@dataclass(frozen=True)
class Located:
    """A node and the graph that it lies in, such as "graph", "graph/if_1/then_branch"."""

    node: onnx.NodeProto
    where: str


def read_onnx(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """The model in a file.

    Args:
        path: The file.
        weights: Whether to read external data too.

    Raises:
        VerificationError: There is no such file, or it holds no readable ONNX graph.
    """
    if not path.is_file():
        raise VerificationError(f"there is no file {path}; export_onnx writes one")
    try:
        model = onnx.load(str(path), load_external_data=weights)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise VerificationError(f"{path} is not a readable ONNX file: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise VerificationError(f"{path} holds no ONNX graph; export it again")
    return model


def located_nodes(model: onnx.ModelProto) -> Iterator[Located]:
    """The nodes of a model in order, each before those of its subgraphs; functions come last."""
    yield from _walk(model.graph.node, "graph")
    for function in model.functions:
        yield from _walk(function.node, f"function {function.domain}:{function.name}")


def _walk(nodes: Iterator[onnx.NodeProto], where: str) -> Iterator[Located]:
    stack = [(iter(nodes), where)]
    while stack:
        here, place = stack[-1]
        node = next(here, None)
        if node is None:
            stack.pop()
            continue
        yield Located(node, place)
        for attribute in reversed(node.attribute):
            for graph in (attribute.g, *attribute.graphs):
                if graph.node:
                    inner = f"{place}/{node.name or node.op_type}/{attribute.name}"
                    stack.append((iter(graph.node), inner))


def all_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of a model, with those of its functions and subgraphs."""
    return [found.node for found in located_nodes(model)]


def describe_type(value: onnx.ValueInfoProto) -> str:
    """Such as "float32[batch,3,224,224]"."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        return value.type.WhichOneof("value") or "untyped"
    dims = ",".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{type_name(tensor.elem_type)}[{dims}]"


def type_name(elem_type: int) -> str:
    """Name of an element type: numpy's where it has one, ONNX's otherwise."""
    name = str(onnx.TensorProto.DataType.Name(elem_type)).lower()
    known = {"float": "float32", "double": "float64"}
    return known.get(name, name)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operator set; 0 if the file imports none."""
    return next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)


def metadata_of(model: onnx.ModelProto | onnx.NodeProto) -> Mapping[str, str]:
    """The metadata of a model or node; claims of whoever wrote it, never proofs."""
    return {entry.key: entry.value for entry in model.metadata_props}
