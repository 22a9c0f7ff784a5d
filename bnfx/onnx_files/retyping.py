"""The same graph in another floating dtype, to run it where a runtime lacks the one it has."""

from __future__ import annotations

from pathlib import Path

import onnx

from bnfx.onnx_files.reading import all_nodes, graphs_of, stored_tensors, tensor_array

FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
HALF, BFLOAT16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16

#: Attributes that name the type of a result.
_TYPED = {("Cast", "to"), ("EyeLike", "dtype"), ("RandomNormal", "dtype"), ("Bernoulli", "dtype")}


def retyped(model: onnx.ModelProto, folder: Path, old: set[int], new: int) -> onnx.ModelProto:
    """A copy of `model` in which every tensor of a type in `old` has the type `new`.

    Args:
        model: The model, with its functions inlined.
        folder: Where its external data lies; the copy holds all of it.
        old: ONNX element types.
        new: A wider one, so that no stored value changes.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(new)
    for tensor, _ in stored_tensors(copy):
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if tensor.data_type in old or external:
            array = tensor_array(tensor, folder)
            array = array.astype(dtype) if tensor.data_type in old else array
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in all_nodes(copy):
        for attribute in node.attribute:
            if (node.op_type, attribute.name) in _TYPED and attribute.i in old:
                attribute.i = new
    for graph, _ in graphs_of(copy):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in old:
                value.type.tensor_type.elem_type = new
    return copy


def float_types(model: onnx.ModelProto) -> set[int]:
    """The floating types of a model's weights, inputs and outputs, and of what it casts to."""
    found = {tensor.data_type for tensor, _ in stored_tensors(model)}
    values = (*model.graph.input, *model.graph.output)
    found |= {value.type.tensor_type.elem_type for value in values}
    for node in all_nodes(model):
        found |= {a.i for a in node.attribute if (node.op_type, a.name) in _TYPED}
    return found & {FLOAT, DOUBLE, HALF, BFLOAT16}
