"""Small ONNX graphs as text, and what must hold whatever is done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import bnfx
from bnfx.file_folding import FoldOnnxReport
from bnfx.numbers import Array

Shape = tuple[int | str, ...]
#: Initializers by name: their values, or shapes of what is drawn.
Weights = dict[str, Any]


def ints(*values: int) -> Array:
    """A constant of integers."""
    return np.array(values, np.int64)


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


def fold(model: onnx.ModelProto, tmp_path: Path, **options: Any) -> FoldOnnxReport:
    """Fold a file; what is left computes the same, is valid, and keeps what must stay."""
    source, out = saved(model, tmp_path), tmp_path / "out.onnx"
    before = source.read_bytes()
    done = bnfx.fold_onnx(source, out, verify=False, **options)
    assert source.read_bytes() == before
    written = onnx.load(str(out))
    onnx.checker.check_model(written, full_check=True)
    for batch, size in ((2, 8), (1, 16)):
        feed = feed_of(model, batch=batch, size=size)
        truth, ours = run(source, feed), run(out, feed)
        assert list(truth) == list(ours)
        for name, value in truth.items():
            assert distance(ours[name], value) < 1e-5, name
    kept_of_file(model, written)
    kept = sum(record.verdict != "folded" for record in done.batch_norms)
    assert len(done.batch_norms) >= kept >= count(written)
    return done


def kept_of_file(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """What folding must not touch."""
    for field in ("ir_version", "producer_name", "doc_string", "opset_import", "metadata_props"):
        assert getattr(before, field) == getattr(after, field), field
    assert list(before.functions) == list(after.functions)
    assert before.graph.name == after.graph.name
    stored = {t.name for m in (before, after) for t in m.graph.initializer}
    inputs = [[v for v in m.graph.input if v.name not in stored] for m in (before, after)]
    assert inputs[0] == inputs[1]
    assert before.graph.output == after.graph.output
    old = {(n.name, n.op_type): n for n in before.graph.node if n.name}
    for node in after.graph.node:
        twin = old.get((node.name, node.op_type))
        if twin is not None and node.op_type != "Constant":
            assert node.attribute == twin.attribute
    values = {name for node in after.graph.node for name in node.output}
    values |= {t.name for t in after.graph.initializer} | {v.name for v in after.graph.input}
    assert {v.name for v in after.graph.value_info} <= values
