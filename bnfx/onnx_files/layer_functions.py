"""Layers and norms of ONNX as torch has them: W transposed, pads of their own, factors inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bnfx.onnx_files.node_call import Call, NoFunction
from bnfx.onnx_files.windows import Window, padded

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def convolution(call: Call) -> fx.Node:
    """Conv. Padding that torch has no argument for is a call of its own."""
    weight = _weight(call, 1)
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3:
        raise NoFunction
    window = Window.of(call, tuple(weight.shape[2:]))
    source, padding = padded(call, call.data(), window, 0.0)
    return call.main(
        _CONVOLUTIONS[spatial - 1],
        source,
        weight=call.parameter(1, 1, "weight"),
        bias=_bias(call, 2),
        stride=window.stride,
        padding=padding,
        dilation=window.dilation,
        groups=call.attribute("group", 1),
    )


def transposed_convolution(call: Call) -> fx.Node:
    """ConvTranspose. What its pads take away unevenly is cut off afterwards."""
    weight = _weight(call, 1)
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3:
        raise NoFunction
    window = Window.of(call, tuple(weight.shape[2:]))
    extra = tuple(call.attribute("output_padding") or (0,) * spatial)
    before, behind = _cut_off(call, window, extra)
    if min(before + behind) < 0:
        raise NoFunction
    even = before == behind
    made = call.main(
        _TRANSPOSED[spatial - 1],
        call.data(),
        weight=call.parameter(1, 1, "weight"),
        bias=_bias(call, 2),
        stride=window.stride,
        padding=before if even else (0,) * spatial,
        output_padding=extra,
        groups=call.attribute("group", 1),
        dilation=window.dilation,
    )
    if even:
        return made
    for axis, (first, last) in enumerate(zip(before, behind, strict=True), 2):
        if first or last:
            end = -last if last else torch.iinfo(torch.int64).max
            made = call.part(torch.ops.aten.slice.Tensor, made, axis, first, end)
    return made


def _cut_off(
    call: Call, window: Window, extra: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is cut off before and behind each axis (ONNX, operator ConvTranspose)."""
    wanted = call.attribute("output_shape")
    if window.automatic in ("NOTSET", "VALID") and not wanted:
        return window.before, window.behind
    sizes = call.shape()[2:]
    total = []
    for axis, n in enumerate(sizes):
        stride, kernel = window.stride[axis], window.extent[axis]
        if wanted:
            if n is None:
                raise NoFunction
            total.append(stride * (n - 1) + extra[axis] + kernel - wanted[axis - len(sizes)])
        else:  # n * stride results
            total.append(kernel + extra[axis] - stride)
    if any(n < 0 for n in total):
        raise NoFunction
    small = tuple(n // 2 for n in total)
    large = tuple(n - s for n, s in zip(total, small, strict=True))
    return (small, large) if window.automatic == "SAME_UPPER" else (large, small)


def _weight(call: Call, at: int) -> Tensor:
    """The weight of a layer; what is quantised around it stays as it is."""
    weight = call.wanted(at)
    maker = call.scope.makers.get(call.name_of(0))
    quantised = maker is not None and call.scope.nodes[maker].op_type == "DequantizeLinear"
    if quantised or not weight.is_floating_point():
        raise NoFunction
    return weight


def _bias(call: Call, at: int) -> fx.Node | None:
    if call.name_of(at):
        return call.parameter(at, 2, "bias")
    call.room_for(at, 2, "bias")
    return None


def gemm(call: Call) -> fx.Node:
    """Y = alpha A' B' + beta C as a linear layer with the weight alpha B'."""
    weight, alpha = _weight(call, 1), float(call.attribute("alpha", 1.0))
    beta = float(call.attribute("beta", 1.0))
    if weight.dim() != 2 or not alpha:
        raise NoFunction
    flat = bool(call.attribute("transB", 0))

    def restored(w: Tensor) -> Tensor:
        w = w if alpha == 1 else (w.double() / alpha).to(w.dtype)
        return w if flat else w.t()

    ours = weight if flat else weight.t()
    ours = ours if alpha == 1 else (ours.double() * alpha).to(ours.dtype)
    source = call.data()
    source = call.part(torch.t, source) if call.attribute("transA", 0) else source
    return call.main(
        F.linear,
        source,
        weight=call.parameter(1, 1, "weight", ours, restored),
        bias=_summand(call, beta, len(ours)),
    )


def _summand(call: Call, beta: float, outputs: int) -> fx.Node | None:
    """Beta C as a bias; one that differs from row to row is none."""

    def restored(b: Tensor) -> Tensor:
        return b if beta == 1 else (b.double() / beta).to(b.dtype)

    if not call.name_of(2):
        if not beta:
            raise NoFunction
        call.room_for(2, 2, "bias", restored)
        return None
    value = call.wanted(2)
    if value.dim() > 2 or (value.dim() == 2 and value.shape[0] != 1) or not beta:
        raise NoFunction
    spread = value.reshape(-1).expand(outputs)
    spread = spread if beta == 1 else (spread.double() * beta).to(spread.dtype)
    return call.parameter(2, 2, "bias", spread, restored)


def product(call: Call) -> fx.Node:
    """MatMul with a constant matrix on the right; an Add behind it alone holds the bias."""
    if call.constant(1) is None or call.wanted(1).dim() != 2:
        left, right = call.operand(0, 0, "input"), call.operand(1, 1, "other")
        return call.main(torch.matmul, left, right)
    weight = _weight(call, 1).t()
    source = call.data()
    call.sum, bias = _sum_behind(call, len(weight)), None
    own = call.parameter(1, 1, "weight", weight, torch.t)
    if call.sum is not None:
        add = call.scope.nodes[call.sum]
        name = add.input[1] if add.input[0] == call.node.output[0] else add.input[0]
        bias = call.scope.read(f"{call.path}.bias", call.scope.constants[name].reshape(-1), name)
    return call.main(F.linear, source, weight=own, bias=bias)


def _sum_behind(call: Call, outputs: int) -> int | None:
    """Place of the one reader, where it adds one constant for each output."""
    scope, name = call.scope, call.node.output[0]
    readers = scope.readers.get(name, [])
    if len(readers) != 1 or name in scope.pinned:
        return None
    add = scope.nodes[readers[0]]
    others = [n for n in add.input if n != name]
    if add.op_type != "Add" or add.domain not in ("", "ai.onnx") or len(others) != 1:
        return None
    known = scope.constants.get(others[0])
    if known is None:  # a constant node may stand between the two
        return None
    read = scope.known.get(call.name_of(0))
    rank = 1 if read is None or read.shape is None else len(read.shape)
    flat = known.dim() >= 1 and known.numel() == outputs == known.shape[-1]
    return readers[0] if flat and known.dim() <= rank else None


# -- norms -----------------------------------------------------------------------------------------


def batch_normalization(call: Call) -> fx.Node:
    """BatchNormalization in inference; other kinds stay, and say why."""
    why = _no_inference(call)
    if why:
        call.scope.refused[call.index] = why
        raise NoFunction
    return call.main(
        F.batch_norm,
        call.operand(0, 0, "input"),
        running_mean=call.operand(3, 1, "running_mean"),
        running_var=call.operand(4, 2, "running_var"),
        weight=call.operand(1, 3, "weight"),
        bias=call.operand(2, 4, "bias"),
        training=False,
        eps=float(call.attribute("epsilon", 1e-5)),
    )


def _no_inference(call: Call) -> str:
    if call.attribute("training_mode", 0):
        return "it normalises with batch statistics (training_mode=1); export it for inference"
    if call.opset < 14 and any(call.node.output[1:]):
        return (
            "it has the outputs of training, so it normalises with batch statistics; export it "
            "for inference"
        )
    if any(call.node.output[1:]):
        return "its statistics are outputs too"
    if call.opset < 9 and not call.attribute("spatial", 1):
        return "it has spatial=0: a scale for each place, not for each channel"
    found = [call.scope.constants.get(call.name_of(at)) for at in range(1, 5)]
    known = [value for value in found if value is not None]
    shapes = {tuple(value.shape) for value in known}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        return f"its parameters have shapes that do not belong together: {sorted(shapes)}"
    if not all(value.is_floating_point() for value in known):
        return "its parameters are no floats"
    return ""


def instance_normalization(call: Call) -> fx.Node:
    """InstanceNormalization."""
    return call.main(
        F.instance_norm,
        call.data(),
        weight=call.operand(1, 3, "weight"),
        bias=call.operand(2, 4, "bias"),
        use_input_stats=True,
        eps=float(call.attribute("epsilon", 1e-5)),
    )


def layer_normalization(call: Call) -> fx.Node:
    """LayerNormalization; its first output only."""
    call.only_output()
    scale = call.wanted(1)
    if call.attribute("stash_type", 1) != 1 or scale.dim() != call.rank() - call.axis(
        call.attribute("axis", -1)
    ):
        raise NoFunction
    known = call.shape()[call.rank() - scale.dim() :]
    if any(n is not None and n != m for n, m in zip(known, scale.shape, strict=True)):
        raise NoFunction  # a scale that is spread
    source, weight = call.data(), call.parameter(1, 2, "weight")
    bias = call.parameter(2, 3, "bias") if call.name_of(2) else None
    if bias is None:
        call.room_for(2, 3, "bias")
    return call.main(
        F.layer_norm,
        source,
        tuple(scale.shape),
        weight,
        bias,
        float(call.attribute("epsilon", 1e-5)),
    )


def group_normalization(call: Call) -> fx.Node:
    """GroupNormalization since opset 21; before, a group had one scale."""
    if call.opset < 21 or call.attribute("stash_type", 1) != 1:
        raise NoFunction
    groups = int(call.attribute("num_groups"))
    source, weight = call.data(), call.parameter(1, 2, "weight")
    bias = call.parameter(2, 3, "bias")
    return call.main(
        F.group_norm, source, groups, weight, bias, float(call.attribute("epsilon", 1e-5))
    )


FUNCTIONS: dict[str, Callable[[Call], Any]] = {
    "BatchNormalization": batch_normalization,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Gemm": gemm,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "MatMul": product,
}
