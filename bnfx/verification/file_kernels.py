"""Operators that onnxruntime has beyond ONNX, in the float64 evaluation of a file.

Nothing but their kernels says what they compute. So the kernel is asked for the one node, its
inputs rounded to float32: everything around it stays in float64, and what the kernel errs by is in
the truth as it is in the reference. It runs in this process, which the file as a whole did not
crash before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from bnfx.numbers import Array
from bnfx.onnx_files.reading import all_nodes
from bnfx.runtime.sessions import SessionSettings, open_session

#: Domains that onnx's reference knows operators of.
_KNOWN = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")


def kernels_of(model: onnx.ModelProto) -> list[type[OpRun]]:
    """An evaluator for each operator of a foreign domain; the model has no functions."""
    named = {(node.domain, node.op_type) for node in all_nodes(model)}
    return [
        type(kind, (_Kernel,), {"op_domain": domain})
        for domain, kind in sorted(named)
        if domain not in _KNOWN
    ]


class _Kernel(OpRun):
    """One node of a foreign domain."""

    session: Any = None

    def _run(self, *inputs: Array | None, **_: Any) -> tuple[Array, ...]:
        names = [f"x{at}" if given is not None else "" for at, given in enumerate(inputs)]
        feed = {name: _narrow(given) for name, given in zip(names, inputs, strict=True) if name}
        if self.session is None:
            self.session = self._opened(names, feed)
        return tuple(_wide(array) for array in self.session.run(None, feed))

    def _opened(self, names: list[str], feed: dict[str, Array]) -> Any:
        node = onnx.NodeProto()
        node.CopyFrom(self.onnx_node)
        del node.input[:]
        node.input.extend(names)
        kind = onnx.helper.np_dtype_to_tensor_dtype
        inputs = [
            onnx.helper.make_tensor_value_info(name, kind(array.dtype), [None] * array.ndim)
            for name, array in feed.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "one", inputs, outputs)
        sets = self.run_params["opsets"].items()
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid(*pair) for pair in sets], ir_version=8
        )
        return open_session(model.SerializeToString(), settings=SessionSettings(optimise=False))


def _narrow(array: Array | None) -> Array:
    values = np.asarray(array)
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype == np.float32 else array
