"""Small ONNX graphs as text, and what must hold whatever is done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bnfx.numbers import Array

Shape = tuple[int | str, ...]
#: Initializers by name: their values, or shapes of what is drawn.
Weights = dict[str, Any]


def graph(
    nodes: str,
    weights: Weights | None = None,
    *,
    x: Shape = (2, 3, 8, 8),
    outputs: str = "y",
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A model of float32 from `x` to `outputs`.

    Args:
        nodes: One node in each line, in ONNX's text form.
        weights: Initializers: their values, or shapes of what is drawn.
        x: Shape of the input; a text is an open size.
        outputs: Their names, as words.
        opset: Version of the standard operator set.
        ir_version: Version of the format.
    """
    made = onnx.parser.parse_graph(f"g (float x) => ({_listed(outputs)}) {{ {nodes} }}")
    made.input[0].CopyFrom(_typed("x", x))
    generator = np.random.default_rng(0)
    for name, value in (weights or {}).items():
        drawn = not isinstance(value, np.ndarray)
        array = np.asarray(generator.normal(size=value) if drawn else value)
        if name.startswith("var"):
            array = np.abs(array) + 0.5
        kind = array.dtype if array.dtype.kind in "iub" else np.float32
        made.initializer.append(onnx.numpy_helper.from_array(array.astype(kind), name))
    found = onnx.helper.make_model(
        made,
        producer_name="bnfx",
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    if ir_version < 4:
        for tensor in found.graph.initializer:
            found.graph.input.append(_typed(tensor.name, tuple(tensor.dims), tensor.data_type))
    for value in found.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(found)


def _listed(outputs: str) -> str:
    return ", ".join(f"float {name}" for name in outputs.split())


def _typed(name: str, shape: Sequence[int | str], kind: int = 1) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, list(shape))


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """The model as a file, its outputs with the shapes that onnx infers."""
    path = folder / name
    onnx.save(model, str(path))
    return path


def feed_of(
    model: onnx.ModelProto, *, batch: int = 2, size: int = 8, seed: int = 1
) -> dict[str, Array]:
    """Random values for the inputs; `batch` and `size` stand for what is open."""
    generator = np.random.default_rng(seed)
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, Array] = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value or (size if at else batch) for at, d in enumerate(dims)]
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        drawn = generator.normal(size=shape)
        found[value.name] = (drawn if np.dtype(kind).kind == "f" else drawn > 0).astype(kind)
    return found


def run(model: onnx.ModelProto | Path, feed: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime computes, without rewriting anything; by the names of the outputs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def distance(a: Array, b: Array) -> float:
    """rms(a - b) / rms(b); infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    wide, truth = a.astype(np.float64), b.astype(np.float64)
    power = float(np.square(truth).mean()) if truth.size else 0.0
    noise = float(np.square(wide - truth).mean()) if truth.size else 0.0
    return float(np.sqrt(noise / power)) if power else float(np.sqrt(noise))


def count(model: onnx.ModelProto | Path, kind: str = "BatchNormalization") -> int:
    """How many nodes of a kind the main graph has."""
    read = onnx.load(str(model)) if isinstance(model, Path) else model
    return sum(node.op_type == kind for node in read.graph.node)
