"""What ONNX infers of the values of a graph: element types, ranks and sizes.

What a file says of them is a claim, and so it is not read: types follow from the inputs and the
nodes alone.
"""

from __future__ import annotations

import numpy as np
import onnx

from bnfx.onnx_files.node_call import Known, Scope
from bnfx.onnx_files.tensors import element_type, stored_form

#: Constants of more elements say nothing about shapes.
_SMALL = 4096


def inferred(model: onnx.ModelProto) -> dict[str, Known]:
    """What ONNX infers of the values of a graph, from its inputs and nodes alone.

    What the file says of other values may be wrong, and large constants need not be copied.
    """
    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = "shapes"
    graph.input.extend(model.graph.input)
    listed = {value.name for value in graph.input}
    for stored in model.graph.initializer:
        if not _is_large(stored):
            graph.initializer.append(stored)
        elif stored.name not in listed:
            graph.input.append(_typed(stored.name, stored))
    for node in model.graph.node:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and tensor is not None and _is_large(tensor):
            graph.input.append(_typed(node.output[0], tensor))
        else:
            graph.node.append(node)
    try:
        found = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError):
        found = graph
    return {value.name: _known(value) for value in (*found.input, *found.value_info)}


def _is_large(stored: onnx.TensorProto) -> bool:
    return bool(stored.external_data) or int(np.prod(stored.dims, dtype=np.int64)) > _SMALL


def _typed(name: str, stored: onnx.TensorProto) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, stored.data_type, list(stored.dims))


def _known(value: onnx.ValueInfoProto) -> Known:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return Known(tensor.elem_type, None)
    sizes = (d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return Known(tensor.elem_type, tuple(n if n is None or n >= 0 else None for n in sizes))


#: What onnx says of a node that is none of its operator's.
_REFUSALS = (
    onnx.checker.ValidationError,
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
)


def improve(scope: Scope, index: int) -> None:
    """Infer the outputs of one node again, from what is known of its inputs by now.

    A whole graph's inference sees no value of a constant that nodes compute.
    """
    node = scope.nodes[index]
    domain = "" if node.domain == "ai.onnx" else node.domain
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return
    types = {name: typed for name in node.input if (typed := _type_of(scope, name)) is not None}
    if any(name and name not in types for name in node.input):
        return
    data = {
        name: stored_form(name, value)
        for name in node.input
        if (value := scope.constants.get(name)) is not None and value.numel() <= _SMALL
    }
    try:
        schema = onnx.defs.get_schema(node.op_type, scope.language.version(domain), domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=list(scope.language.opsets)
        )
    except (*_REFUSALS, RuntimeError, ValueError):
        return
    for name, typed in found.items():
        new, old = _known(onnx.ValueInfoProto(type=typed)), scope.known.get(name)
        if new.shape is not None and (old is None or _worth(new) > _worth(old)):
            scope.known[name] = new


def _worth(known: Known) -> int:
    """How much is known: the rank, and each size."""
    return -1 if known.shape is None else sum(n is not None for n in known.shape)


def _type_of(scope: Scope, name: str) -> onnx.TypeProto | None:
    value, known = scope.constants.get(name), scope.known.get(name)
    if value is not None:
        kind = element_type(value.dtype)
        return onnx.helper.make_tensor_type_proto(kind, list(value.shape))
    if known is None or not known.elem_type:
        return None
    return onnx.helper.make_tensor_type_proto(known.elem_type, known.shape)
