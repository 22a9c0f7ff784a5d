"""Foldings as one thing: a module and an input in; what computes, and the BatchNorms left, out.

Each is called as its own documentation says, at the versions that are installed. Whatever it raises
is its refusal.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

#: The network as an ONNX file that nothing was folded in, exported when it is first asked for.
File = Callable[[], onnx.ModelProto]
#: What a folding gives: a function of the input, and how many BatchNorms it still evaluates; None
#: where that cannot be seen.
Folded = tuple[Callable[[Tensor], Tensor], int | None]


@dataclass(frozen=True)
class Tool:
    """A folding by somebody."""

    name: str
    #: The distribution whose version counts.
    package: str
    fold: Callable[[nn.Module, Tensor, File], Folded]


def _graph(found: Any) -> Folded:
    left = sum("batch_norm" in str(node.target) for node in found.graph.nodes)
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in found.modules())
    return found, left or norms


def _bnfx(net: nn.Module, x: Tensor, _: File) -> Folded:
    bnfx = importlib.import_module("bnfx")
    folded = bnfx.fold_bn(net, (x,))
    return folded, bnfx.report(folded).left


def _bnfx_file(_: nn.Module, __: Tensor, file: File) -> Folded:
    bnfx = importlib.import_module("bnfx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        onnx.save(file(), path)
        bnfx.fold_onnx(path, path, verify=False)  # it is judged here
        return ran(onnx.load(path))


def _fx(net: nn.Module, _: Tensor, __: File) -> Folded:
    return _graph(importlib.import_module("torch.fx.experimental.optimization").fuse(net))


def _torchao(net: nn.Module, x: Tensor, _: File) -> Folded:
    utils = importlib.import_module("torchao.quantization.pt2e.utils")
    graph = torch.export.export(net, (x,)).module()
    utils._fuse_conv_bn_(graph)
    return _graph(graph)


def _inductor(net: nn.Module, x: Tensor, _: File) -> Folded:
    config = importlib.import_module("torch._inductor.config")
    torch.compiler.reset()
    with config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(net)
        compiled(x)
    return compiled, None


def exported(net: nn.Module, x: Tensor, *, optimize: bool = False) -> onnx.ModelProto:
    """The network as torch's exporter writes it; with `optimize`, which folds too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        program = torch.onnx.export(net, (x,), dynamo=True, optimize=optimize, verbose=False)
    assert program is not None
    return program.model_proto


def ran(model: onnx.ModelProto, *, level: int = 0) -> Folded:
    """A file in onnxruntime, without its own optimisations unless a level is given."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel(level)
    options.log_severity_level = 3
    kept = model
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "o.onnx")
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        kept = onnx.load(options.optimized_model_filepath)

    def run(x: Tensor) -> Tensor:
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(np.asarray(y))

    graphs = (kept.graph, *kept.functions)
    return run, sum(n.op_type == "BatchNormalization" for g in graphs for n in g.node)


def _exporter(net: nn.Module, x: Tensor, _: File) -> Folded:
    return ran(exported(net, x, optimize=True))


def _file(change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Callable[..., Folded]:
    return lambda _net, _x, file: ran(change(file()))


def _onnxruntime(_: nn.Module, __: Tensor, file: File) -> Folded:
    return ran(file(), level=2)


def _openvino(_: nn.Module, __: Tensor, file: File) -> Folded:
    openvino = importlib.import_module("openvino")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        onnx.save(file(), path)
        model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda value: torch.from_numpy(np.array(model(value.numpy())[0])), None


def _aimet(net: nn.Module, x: Tensor, _: File) -> Folded:
    _torchvision()
    folds = importlib.import_module("aimet_torch.batch_norm_fold")
    own = copy.deepcopy(net)  # it works in place
    folds.fold_all_batch_norms(own, tuple(x.shape), dummy_input=x)
    return own, sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in own.modules())


def _aimet_file(model: onnx.ModelProto) -> onnx.ModelProto:
    done = onnx.ModelProto()
    done.CopyFrom(model)  # it works in place
    importlib.import_module("aimet_onnx.batch_norm_fold").fold_all_batch_norms_to_weight(done)
    return done


def _mct(net: nn.Module, x: Tensor, _: File) -> Folded:
    """Its graph before anything is quantised, as a model; it offers no folding by itself."""
    _torchvision()
    mct = importlib.import_module("model_compression_toolkit")
    inner = importlib.import_module("model_compression_toolkit.core.pytorch.pytorch_implementation")
    frame = importlib.import_module("model_compression_toolkit.core.pytorch.default_framework_info")
    attach = importlib.import_module(
        "model_compression_toolkit.target_platform_capabilities"
        ".targetplatform2framework.attach2pytorch"
    )
    runner = importlib.import_module("model_compression_toolkit.core.graph_prep_runner")
    modes = importlib.import_module("model_compression_toolkit.core.common.model_builder_mode")
    options = mct.core.QuantizationConfig()
    target = attach.AttachTpcToPytorch().attach(
        mct.get_target_platform_capabilities(), options.custom_tpc_opset_to_layer
    )
    toolkit, info = inner.PytorchImplementation(), frame.DEFAULT_PYTORCH_INFO
    graph = runner.graph_preparation_runner(
        net, lambda: iter([[x]]), options, info, toolkit, target
    )
    model, _info = toolkit.model_builder(
        graph, mode=modes.ModelBuilderMode.FLOAT, append2output=None
    )
    return model, sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _torchvision() -> None:
    """What imports torchvision needs it beside any torch."""
    importlib.import_module("bnfx.cli.libraries").open_torchvision()


def _optimizer(model: onnx.ModelProto) -> onnx.ModelProto:
    optimizer = importlib.import_module("onnxoptimizer")
    done = optimizer.optimize(model, optimizer.get_fuse_and_elimination_passes())
    assert isinstance(done, onnx.ModelProto)
    return done


def _sim(model: onnx.ModelProto) -> onnx.ModelProto:
    done, _ = importlib.import_module("onnxsim").simplify(model)
    assert isinstance(done, onnx.ModelProto)
    return done


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    done = importlib.import_module("onnxslim").slim(model)
    assert isinstance(done, onnx.ModelProto)
    return done


TOOLS = (
    Tool("bnfx fold_bn", "bnfx", _bnfx),
    Tool("bnfx fold_onnx", "bnfx", _bnfx_file),
    Tool("torch.fx fuse", "torch", _fx),
    Tool("torchao _fuse_conv_bn_", "torchao", _torchao),
    Tool("torch.onnx.export", "torch", _exporter),
    Tool("onnxsim", "onnxsim", _file(_sim)),
    Tool("onnxslim", "onnxslim", _file(_slim)),
    Tool("onnxoptimizer", "onnxoptimizer", _file(_optimizer)),
    Tool("onnxruntime", "onnxruntime", _onnxruntime),
    Tool("OpenVINO", "openvino", _openvino),
    Tool("AIMET, module", "aimet-torch", _aimet),
    Tool("AIMET, file", "aimet-onnx", _file(_aimet_file)),
    Tool("MCT, before quantising", "model-compression-toolkit", _mct),
    Tool("Inductor, freezing", "torch", _inductor),
)
