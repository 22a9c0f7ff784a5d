"""What others fold: torch.fx's fuse, torch.onnx.export, and the optimisers of ONNX files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse


def evaluations(model: nn.Module, x: Tensor) -> int:
    """How often `model` evaluates BatchNorm on `x`."""
    counted = 0
    plain = F.batch_norm

    def count(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal counted
        counted += 1
        return plain(*args, **kwargs)

    with mock.patch.object(F, "batch_norm", count), torch.no_grad():
        model(x)
    return counted


def fx_fuse(model: nn.Module) -> nn.Module:
    """torch.fx's own folding; raises whatever it raises."""
    fused = fuse(model)
    assert isinstance(fused, nn.Module)
    return fused


def export(model: nn.Module, x: Tensor, path: Path, *, optimize: bool = True) -> onnx.ModelProto:
    """The ONNX graph of torch.onnx.export, which folds BatchNorm too where `optimize`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        program = torch.onnx.export(model, (x,), dynamo=True, optimize=optimize, verbose=False)
    assert program is not None
    program.save(path)
    return onnx.load(path)


@contextlib.contextmanager
def batch_norms_dropped() -> Iterator[None]:
    """Inside, BatchNorm does nothing: no folding can leave fewer operators."""

    def nothing(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return x

    with mock.patch.object(F, "batch_norm", nothing):
        yield


def count(proto: onnx.ModelProto) -> tuple[int, int]:
    """BatchNorms and operators of a graph; constants and identities are no operators."""
    graphs = [list(proto.graph.node), *(list(f.node) for f in proto.functions)]
    kinds = [node.op_type for nodes in graphs for node in nodes]
    operators = [kind for kind in kinds if kind not in ("Constant", "Identity")]
    return kinds.count("BatchNormalization"), len(operators)


def _onnxsim(path: Path) -> onnx.ModelProto:
    simplified, _ = importlib.import_module("onnxsim").simplify(onnx.load(path))
    assert isinstance(simplified, onnx.ModelProto)
    return simplified


def _onnxslim(path: Path) -> onnx.ModelProto:
    slimmed = importlib.import_module("onnxslim").slim(onnx.load(path))
    assert isinstance(slimmed, onnx.ModelProto)
    return slimmed


def _onnxoptimizer(path: Path) -> onnx.ModelProto:
    optimizer = importlib.import_module("onnxoptimizer")
    done = optimizer.optimize(onnx.load(path), optimizer.get_fuse_and_elimination_passes())
    assert isinstance(done, onnx.ModelProto)
    return done


def _onnxruntime(path: Path) -> onnx.ModelProto:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


OPTIMISERS: dict[str, Callable[[Path], onnx.ModelProto]] = {
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxoptimizer": _onnxoptimizer,
    "onnxruntime": _onnxruntime,
}


def installed(peer: str) -> bool:
    """Whether this optimiser is there."""
    return importlib.util.find_spec(peer) is not None
