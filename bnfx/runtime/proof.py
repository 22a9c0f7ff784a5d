"""What proves where onnxruntime ran a graph, and in which arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from bnfx.errors import ProviderError
from bnfx.onnx_files.reading import all_nodes
from bnfx.runtime.sessions import SessionSettings, open_session

#: TF32 keeps 10 bits of the mantissa: this becomes 1.0 in it, and survives float32.
CANARY = 1.0 + 2.0**-12

#: Operators that only ask for shapes, whatever they are given.
_SHAPES = {"Shape", "Size"}
#: Operators that may run on the CPU where they compute integers, as shapes are.
_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Equal", "Less", "Greater", "Where"),
    *("Cast", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Range", "Identity"),
    *("Not", "And", "Or", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceSum", "ConstantOfShape"),
    *("Constant", "Expand", "Split", "Floor", "Ceil", "GreaterOrEqual", "LessOrEqual"),
}
_WHOLE = {
    *(TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.INT8),
    *(TensorProto.UINT64, TensorProto.UINT32, TensorProto.UINT8, TensorProto.BOOL),
}


def off_provider(session: Any, name: str, model: str) -> tuple[list[str], list[str]]:
    """The nodes that another provider holds: those that compute, and those of shape arithmetic.

    Args:
        session: Of onnxruntime, with the assignment of nodes recorded.
        name: Execution provider that must hold what computes.
        model: The file, to look up what type a node of doubtful kind computes.
    """
    others = [
        (str(node.op_type), str(node.name))
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != name
        for node in part.get_nodes()
    ]
    return sort_strays(others, whole_number_nodes(model) if others else set())


def sort_strays(nodes: Iterable[tuple[str, str]], whole: set[str]) -> tuple[list[str], list[str]]:
    """Nodes off the provider, as (operator, name): which compute, which are shape arithmetic.

    Args:
        nodes: Operator type and name of each.
        whole: Names of the nodes whose results are integers or booleans.
    """
    wrong: list[str] = []
    shapes: list[str] = []
    for kind, node in nodes:
        small = kind in _SHAPES or (kind in _ARITHMETIC and node in whole)
        (shapes if small else wrong).append(f"{kind} {node!r}")
    return wrong, shapes


def whole_number_nodes(model: str) -> set[str]:
    """Names of the nodes of a file whose results are all integers or booleans."""
    proto = onnx.load(model, load_external_data=False)
    try:
        proto = onnx.shape_inference.infer_shapes(proto)
    except (onnx.shape_inference.InferenceError, ValueError):
        return set()
    types = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in proto.graph.output}
    return {
        node.name
        for node in all_nodes(proto)
        if node.name and all(types.get(name) in _WHOLE for name in node.output if name)
    }


def canary(provider: str, *, tf32: bool) -> dict[str, Any]:
    """Multiply 1 + 2^-12 by one, in a MatMul and in a Conv, and look at what is left of it.

    Returns:
        Under "canary" what came back by operator, under "tf32" whether it was rounded to TF32.

    Raises:
        ProviderError: It was rounded to TF32 although float32 was asked for.
    """
    settings = SessionSettings(tf32=tf32)
    found = {}
    for kind, model in (("MatMul", _matmul()), ("Conv", _conv())):
        session = open_session(model.SerializeToString(), provider, settings)
        (value,) = session.get_inputs()
        x = np.full(value.shape, CANARY, np.float32)
        (out,) = session.run(None, {value.name: x})
        found[kind] = float(np.asarray(out).max())
    rounded = any(value != CANARY for value in found.values())
    if rounded and not tf32:
        raise ProviderError(
            f"{provider} computed in TF32, not in float32: {CANARY} came back as {found}; unset "
            "NVIDIA_TF32_OVERRIDE, or verify with precision='tf32'"
        )
    return {"canary": found, "tf32": rounded}


def _matmul() -> onnx.ModelProto:
    eye = onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    return _probe(helper.make_node("MatMul", ["x", "w"], ["y"]), eye, [64, 64])


def _conv() -> onnx.ModelProto:
    eye = np.eye(64, dtype=np.float32).reshape(64, 64, 1, 1)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    return _probe(node, onnx.numpy_helper.from_array(eye, "w"), [1, 64, 8, 8])


def _probe(node: onnx.NodeProto, weight: onnx.TensorProto, shape: list[int]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "probe", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def loaded_libraries() -> dict[str, bool]:
    """Which CUDA libraries this process has loaded; empty where the system does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return {}
    return {name: f"lib{name}" in maps for name in ("cudnn", "cublas", "cudart")}
