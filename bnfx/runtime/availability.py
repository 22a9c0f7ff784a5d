"""Whether a provider runs layers here: a small network is tried."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bnfx.runtime.assignment import placed_nodes, require_placed
from bnfx.runtime.providers import Where
from bnfx.runtime.sessions import faults, open_session


def cuda_unavailable_reason() -> str | None:
    """Why onnxruntime cannot run layers on CUDA here; None where it can."""
    return unavailable_reason("cuda")


def unavailable_reason(provider: str | Where) -> str | None:
    """Why onnxruntime cannot run layers on `provider` here; None where it can.

    A convolution and a product of matrices are run: CUDA takes their libraries only then.
    """
    where = Where.of(provider) if isinstance(provider, str) else provider
    try:
        session = open_session(_network(), where)
        require_placed(placed_nodes(session), where, "the probe")
        session.run(None, {"x": np.ones((1, 4, 4, 4), np.float32)})
    except faults() as error:
        return str(error)
    return None


def _network() -> bytes:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4),
        helper.make_node("MatMul", ["y", "m"], ["z"], "product"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 4, 4])
    taken = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4, 4, 4])
    weights = [
        numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w"),
        numpy_helper.from_array(np.ones((4, 4), np.float32), "m"),
    ]
    graph = helper.make_graph(nodes, "probe", [given], [taken], weights)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return bytes(model.SerializeToString())
