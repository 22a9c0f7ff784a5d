"""What onnxruntime is given: the file itself, or a copy that it can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner

from bnfx.errors import VerificationError
from bnfx.onnx_files.reading import stored_tensors
from bnfx.onnx_files.retyping import BFLOAT16, FLOAT, float_types, retyped
from bnfx.verification.file_layers import FileGraph, layer_nodes

_INLINE_BYTES = 1_900_000_000


@dataclass(frozen=True)
class Staged:
    """Files and facts for one request."""

    #: The file to run.
    model: str
    #: Folder of the external data of copies; "" where they have none.
    weights: str
    #: The file, or a copy, without functions: `graph` is its; "" if no values of it are wanted.
    values_model: str
    #: Its layers.
    graph: FileGraph
    #: How it differs from the file that was asked for.
    notes: tuple[str, ...]


def stage(
    proto: onnx.ModelProto, path: Path, folder: Path, *, on_cpu: bool, values: bool
) -> Staged:
    """Prepare a file to run.

    Args:
        proto: What is in the file.
        path: The file.
        folder: Where copies go.
        on_cpu: Whether it will run on the CPU, which has no operators for bfloat16, so that there a
            copy runs in float32, with the weights as they are.
        values: Whether values between layers are wanted.

    Raises:
        VerificationError: The model's functions cannot be inlined.
    """
    model, run, notes = inlined(proto, path), str(path), list[str]()
    same = model is proto
    if BFLOAT16 in float_types(model):
        model = retyped(model, path.parent, {BFLOAT16}, FLOAT)
        same = on_cpu
        if same:
            run = _save(model, folder / "float32.onnx")
            notes.append(
                "onnxruntime's CPU has no kernels for bfloat16: the weights are checked as stored, "
                "the outputs of a copy in float32 with the same weights"
            )
    external = any(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor, _ in stored_tensors(model)
    )
    graph = layer_nodes(model, path.parent)
    shown = ""
    if values:
        shown = run if same else _save(model, folder / "values.onnx")
    return Staged(run, str(path.parent) if external else "", shown, graph, tuple(notes))


def inlined(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model without functions of its own.

    Raises:
        VerificationError: They cannot be inlined.
    """
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise VerificationError(f"the functions of {path} cannot be inlined: {error}") from error


def _save(model: onnx.ModelProto, target: Path) -> str:
    large = sum(len(t.raw_data) for t in model.graph.initializer) > _INLINE_BYTES
    onnx.save(model, str(target), save_as_external_data=large, location=f"{target.name}.data")
    return str(target)
