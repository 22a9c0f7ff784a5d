"""ONNX files as they lie on disk: reading them with distrust, walking their nodes.

Whatever a file claims is checked against what is there before anything is allocated for it: the
length of every tensor, the place of external data, names that nobody defines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from bnfx.errors import VerificationError
from bnfx.numbers import Array

#: Key of the file's metadata under which the names of folded parameters stand.
FOLDED = "bnfx.folded"
#: Key of the file's metadata under which the options of that folding stand.
OPTIONS = "bnfx.options"
#: Key of the file's metadata under which the version of bnfx stands.
VERSION = "bnfx.version"

_PROTOBUF_BYTES = 2**31
_EXTERNAL = onnx.TensorProto.EXTERNAL
#: Fields of a tensor that holds its values as numbers, and how many numbers make one value.
_FIELDS: dict[int, tuple[str, int]] = {
    onnx.TensorProto.DOUBLE: ("double_data", 1),
    onnx.TensorProto.COMPLEX64: ("float_data", 2),
    onnx.TensorProto.COMPLEX128: ("double_data", 2),
    onnx.TensorProto.FLOAT: ("float_data", 1),
    onnx.TensorProto.INT64: ("int64_data", 1),
    onnx.TensorProto.UINT64: ("uint64_data", 1),
    onnx.TensorProto.UINT32: ("uint64_data", 1),
}
_BITS_4 = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}


@dataclass(frozen=True)
class Located:
    """A node and the graph that it lies in, such as "graph", "graph/if_1/then_branch"."""

    node: onnx.NodeProto
    where: str


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in a file, checked; external data stays where it is, see `tensor_array`.

    Raises:
        VerificationError: There is no such file; it holds no readable ONNX graph; a tensor claims
            other bytes than there are; external data is missing, too short or outside the file's
            folder; a node reads a value that nothing before it defines.
    """
    if not path.is_file():
        raise VerificationError(f"there is no file {path}; export_onnx writes one")
    if path.stat().st_size >= _PROTOBUF_BYTES:
        raise VerificationError(
            f"{path} has {path.stat().st_size:,} bytes; an ONNX graph holds at most 2 GiB, with "
            "larger weights as external data"
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise VerificationError(f"{path} is not a readable ONNX file: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise VerificationError(f"{path} holds no ONNX graph; export it again")
    for tensor, where in stored_tensors(model):
        fault = _tensor_fault(tensor, path.parent)
        if fault:
            raise VerificationError(f"{path}: tensor {tensor.name!r} of {where} {fault}")
    fault = _graph_fault(model)
    if fault:
        raise VerificationError(f"{path} is not a valid ONNX graph: {fault}")
    return model


def stored_tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Every dense tensor that a file stores, and where: initialisers and attributes of nodes."""
    for graph, where in graphs_of(model):
        for tensor in graph.initializer:
            yield tensor, where
        for sparse in graph.sparse_initializer:
            yield sparse.values, where
            yield sparse.indices, where
    for found in located_nodes(model):
        for attribute in found.node.attribute:
            if attribute.HasField("t"):
                yield attribute.t, f"{found.where}, node {found.node.name!r}"
            for tensor in attribute.tensors:
                yield tensor, f"{found.where}, node {found.node.name!r}"


def tensor_array(tensor: onnx.TensorProto, folder: Path) -> Array:
    """The values of a stored tensor; external data lies in `folder`.

    Raises:
        VerificationError: They cannot be read.
    """
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor, base_dir=str(folder)))
    except (OSError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise VerificationError(f"tensor {tensor.name!r} cannot be read: {error}") from error


def located_nodes(model: onnx.ModelProto) -> Iterator[Located]:
    """The nodes of a model in order, each before those of its subgraphs; functions come last."""
    yield from _walk(model.graph.node, "graph")
    for function in model.functions:
        yield from _walk(function.node, f"function {function.domain}:{function.name}")


def _walk(nodes: Iterable[onnx.NodeProto], where: str) -> Iterator[Located]:
    stack = [(iter(nodes), where)]
    while stack:
        here, place = stack[-1]
        node = next(here, None)
        if node is None:
            stack.pop()
            continue
        yield Located(node, place)
        for name, graph in reversed(list(inner_graphs(node))):
            stack.append((iter(graph.node), f"{place}/{node.name or node.op_type}/{name}"))


def inner_graphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The subgraphs of a node, and the attributes that hold them."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield attribute.name, graph


def graphs_of(model: onnx.ModelProto) -> Iterator[tuple[onnx.GraphProto, str]]:
    """The main graph and every subgraph, those inside functions included."""
    yield model.graph, "graph"
    for found in located_nodes(model):
        for name, graph in inner_graphs(found.node):
            yield graph, f"{found.where}/{found.node.name or found.node.op_type}/{name}"


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
    """Name of an element type, as numpy and torch write it."""
    if elem_type not in onnx.TensorProto.DataType.values():
        return f"type {elem_type}"
    name = str(onnx.TensorProto.DataType.Name(elem_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operator set; 0 if the file imports none."""
    return next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)


def metadata_of(model: onnx.ModelProto | onnx.NodeProto) -> Mapping[str, str]:
    """The metadata of a model or node; claims of whoever wrote it, never proofs."""
    return {entry.key: entry.value for entry in model.metadata_props}


def external_location(tensor: onnx.TensorProto) -> tuple[str, int, int | None]:
    """Location, offset and length (None: to the end) of external data."""
    entry = {e.key: e.value for e in tensor.external_data}
    length = entry.get("length", "")
    return (
        entry.get("location", ""),
        int(entry["offset"]) if entry.get("offset", "").isdecimal() else 0,
        int(length) if length.isdecimal() else None,
    )


def _tensor_fault(tensor: onnx.TensorProto, folder: Path) -> str:
    """What is wrong with the claims of a tensor; "" if nothing is."""
    kind = tensor.data_type
    if kind not in onnx.TensorProto.DataType.values() or kind == onnx.TensorProto.UNDEFINED:
        return f"has the unknown element type {kind}"
    if any(dim < 0 for dim in tensor.dims):
        return f"has a negative dimension: {list(tensor.dims)}"
    count = math.prod(tensor.dims)
    if kind == onnx.TensorProto.STRING:
        held = len(tensor.string_data)
        return "" if held == count else f"claims {count:,} strings and holds {held:,}"
    size = _bytes(kind, count)
    if tensor.data_location == _EXTERNAL:
        return _external_fault(tensor, size, folder)
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
        return "" if held == size else f"claims {size:,} bytes and holds {held:,}"
    field, per_value = _FIELDS.get(kind, ("int32_data", 1))
    held = len(getattr(tensor, field))
    wanted = (count + 1) // 2 if kind in _BITS_4 else count * per_value
    return "" if held in (wanted, size) else f"claims {wanted:,} numbers and holds {held:,}"


def _bytes(kind: int, count: int) -> int:
    if kind in _BITS_4:
        return (count + 1) // 2
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _external_fault(tensor: onnx.TensorProto, size: int, folder: Path) -> str:
    location, offset, length = external_location(tensor)
    if not location:
        return "has its data elsewhere and does not say where"
    keys = [entry.key for entry in tensor.external_data]
    if len(keys) != len(set(keys)):
        return f"says twice where its data is: {', '.join(keys)}; readers would differ"
    inside = folder.resolve()
    try:
        data = (inside / location).resolve()
        data.exists()
    except (OSError, ValueError) as error:  # too long, a null character
        return f"has its data in {location[:80]!r}, which cannot be the name of a file: {error}"
    if Path(location).is_absolute() or not data.is_relative_to(inside):
        return f"has its data outside the file's folder, in {location!r}; refused"
    if not data.is_file():
        return f"has its data in {location!r}, which is missing; copy it beside the graph"
    if length is not None and length != size:
        return f"claims {size:,} bytes and points to {length:,}"
    held = data.stat().st_size
    if offset + size > held:
        return f"needs bytes {offset:,} to {offset + size:,} of {location!r}, which has {held:,}"
    return ""


def _graph_fault(model: onnx.ModelProto) -> str:
    """A value that is read before it is defined, or defined twice; "" if there is none.

    A cycle shows as a value that is read before it is defined.
    """
    fault = _body_fault(model.graph, frozenset(), "graph")
    if fault:
        return fault
    for function in model.functions:
        inputs = frozenset(function.input)
        where = f"function {function.domain}:{function.name}"
        fault = _nodes_fault(function.node, set(inputs), where)
        if fault:
            return fault
    return ""


def _body_fault(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> str:
    known = {*outer, *(value.name for value in graph.input)}
    known |= {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    fault = _nodes_fault(graph.node, known, where)
    if fault:
        return fault
    missing = next((v.name for v in graph.output if v.name not in known), None)
    return f"output {missing!r} of {where} is computed by no node" if missing is not None else ""


def _nodes_fault(nodes: Iterable[onnx.NodeProto], known: set[str], where: str) -> str:
    """Of one graph; `known` grows by what its nodes define."""
    defined: set[str] = set()
    for node in nodes:
        missing = next((name for name in node.input if name and name not in known), None)
        if missing is not None:
            return (
                f"node {node.name or node.op_type!r} of {where} reads {missing!r}, which nothing "
                "before it defines (missing, or part of a cycle)"
            )
        for name, graph in inner_graphs(node):
            fault = _body_fault(graph, frozenset(known), f"{where}/{node.name}/{name}")
            if fault:
                return fault
        twice = next((name for name in node.output if name and name in defined), None)
        if twice is not None:
            return f"{twice!r} of {where} is defined twice"
        defined.update(node.output)
        known.update(node.output)
    return ""
