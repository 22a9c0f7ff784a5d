"""Elementwise operators, pools, means and interpolation of ONNX as torch has them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.onnx_files.node_call import Call, NoFunction
from bnfx.onnx_files.tensors import dtype_of
from bnfx.onnx_files.windows import Window, padded, pads_of

_ADAPTIVE_MAX = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_MAX = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _one(function: Any, call: Call) -> fx.Node:
    return call.main(function, call.data())


def _two(function: Any, call: Call) -> fx.Node:
    """Of two operands; Sum, Max and Min may have any number."""
    if len(call.node.input) != 2 or call.opset < 7:
        raise NoFunction
    return call.main(function, call.operand(0, 0, "input"), call.operand(1, 1, "other"))


def _sum(call: Call) -> fx.Node:
    return _two(torch.add, call)


def _divided(call: Call) -> fx.Node:
    """Div; of integers it cuts off towards zero."""
    known = call.scope.known.get(call.name_of(0)) or call.scope.known.get(call.name_of(1))
    kind = dtype_of(known.elem_type) if known is not None else None
    if kind is None or not kind.is_floating_point:
        raise NoFunction
    return _two(torch.div, call)


def _leaky(call: Call) -> fx.Node:
    return call.main(F.leaky_relu, call.data(), float(call.attribute("alpha", 0.01)))


def _gelu(call: Call) -> fx.Node:
    return call.main(F.gelu, call.data(), approximate=call.attribute("approximate", "none"))


def _prelu(call: Call) -> fx.Node:
    """With one slope, or one for each channel of axis 1."""
    slope = call.wanted(1)
    channels = slope.dim() == call.rank() - 1 and math.prod(slope.shape[1:]) == 1
    whole = slope.dim() == call.rank() and slope.shape[0] == math.prod(slope.shape[2:]) == 1
    if slope.numel() != 1 and not channels and not whole:
        raise NoFunction
    weight = call.scope.read(f"{call.path}.slope", slope.reshape(-1), call.name_of(1))
    return call.main(F.prelu, call.data(), weight)


def _clip(call: Call) -> fx.Node:
    """Between numbers; max(x, 0) is a ReLU."""
    lower, upper = call.attribute("min"), call.attribute("max")
    if call.opset >= 11:
        given = [call.wanted(at) if call.name_of(at) else None for at in (1, 2)]
        if any(value is not None and value.numel() != 1 for value in given):
            raise NoFunction
        lower, upper = (None if value is None else value.item() for value in given)
    largest = torch.finfo(torch.float32).max
    lower = None if lower is None or lower <= -largest else lower
    upper = None if upper is None or upper >= largest else upper
    if lower == 0 and upper is None:
        return call.main(F.relu, call.data())
    if lower is None and upper is None:
        return call.main(torch.clone, call.data())
    if lower is not None and upper is not None and lower > upper:
        raise NoFunction
    return call.main(torch.clamp, call.data(), lower, upper)


def _identity(call: Call) -> fx.Node:
    return call.main(torch.clone, call.data())


def _dropout(call: Call) -> fx.Node:
    """In inference it is nothing."""
    call.only_output()
    if call.name_of(2) and bool(call.wanted(2).any()):
        raise NoFunction
    return call.main(torch.clone, call.data())


def _cast(call: Call) -> fx.Node:
    """To another dtype; to the one that is there it is nothing."""
    known, wanted = call.scope.known.get(call.name_of(0)), dtype_of(int(call.attribute("to")))
    if wanted is None:
        raise NoFunction
    if known is not None and dtype_of(known.elem_type) is wanted:
        return call.main(torch.clone, call.data())
    return call.method("to", call.data(), wanted)


def _softmax(function: Any, call: Call) -> fx.Node:
    """Over one axis; before opset 13 over all from that axis on."""
    axis = int(call.attribute("axis", -1 if call.opset >= 13 else 1))
    if call.opset < 13 and call.axis(axis) != call.rank() - 1:
        raise NoFunction
    return call.main(function, call.data(), axis)


# -- pools, means ----------------------------------------------------------------------------------


def _max_pool(call: Call) -> fx.Node:
    """MaxPool. Pads are elements at the edge where torch has none: they are no larger."""
    call.only_output()
    if call.attribute("storage_order", 0):
        raise NoFunction
    window = Window.of(call, tuple(call.attribute("kernel_shape")))
    before, behind = pads_of(call, window)
    narrow = all(2 * p <= k for p, k in zip(before + behind, window.kernel * 2, strict=True))
    if before != behind or not narrow:
        dilated = any(d != 1 for d in window.dilation)
        wide = any(p >= k for p, k in zip(before + behind, window.kernel * 2, strict=True))
        if dilated or wide or call.attribute("ceil_mode", 0) or before == behind:
            raise NoFunction
    source, padding = padded(call, call.data(), window, None)
    return call.main(
        _pool(_MAX, window),
        source,
        window.kernel,
        window.stride,
        padding,
        window.dilation,
        bool(call.attribute("ceil_mode", 0)),
    )


def _average_pool(call: Call) -> fx.Node:
    """AveragePool. Zeros are counted only where the node says so."""
    window = Window.of(call, tuple(call.attribute("kernel_shape")))
    counted, ceil = bool(call.attribute("count_include_pad", 0)), call.attribute("ceil_mode", 0)
    before, behind = pads_of(call, window)
    if any(d != 1 for d in window.dilation) or min(before + behind) < 0:
        raise NoFunction
    wide = any(2 * p > k for p, k in zip(before, window.kernel, strict=True))
    if (before != behind or wide) and not counted:
        raise NoFunction
    if counted and (ceil or (before == behind and wide)):
        raise NoFunction
    source, padding = padded(call, call.data(), window, 0.0)
    return call.main(
        _pool(_AVERAGE, window),
        source,
        window.kernel,
        window.stride,
        padding,
        bool(ceil),
        counted,
    )


def _pool(functions: tuple[Any, ...], window: Window) -> Any:
    if not 1 <= len(window.kernel) <= 3:
        raise NoFunction
    return functions[len(window.kernel) - 1]


def _global_average(call: Call) -> fx.Node:
    return call.main(torch.mean, call.data(), tuple(range(2, call.rank())), keepdim=True)


def _global_max(call: Call) -> fx.Node:
    if not 3 <= call.rank() <= 5:
        raise NoFunction
    return call.main(_ADAPTIVE_MAX[call.rank() - 3], call.data(), 1)


def _reduced(function: Any, since: int, call: Call) -> fx.Node:
    """A mean or a sum; since an opset the axes are an input."""
    axes = call.attribute("axes")
    if call.opset >= since:
        axes = call.numbers(1) if call.name_of(1) else None
        if not axes and call.attribute("noop_with_empty_axes", 0):
            raise NoFunction
    axes = tuple(axes) if axes else tuple(range(call.rank()))
    kept = bool(call.attribute("keepdims", 1))
    return call.main(function, call.data(), axes, keepdim=kept)


# -- interpolation ---------------------------------------------------------------------------------

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _upsample(call: Call) -> fx.Node:
    """Upsample, which knows factors only; linear it is torch's in no version."""
    if call.attribute("mode", "nearest") != "nearest":
        raise NoFunction
    factors = call.attribute("scales") if call.opset < 9 else call.wanted(1).tolist()
    return _resized(call, tuple(float(f) for f in factors), None, "nearest", {})


def _resize(call: Call) -> fx.Node:
    """Resize where torch interpolates in the same way."""
    if call.opset < 11:
        if call.attribute("mode", "nearest") != "nearest":
            raise NoFunction
        factors = tuple(float(f) for f in call.wanted(1).tolist())
        return _resized(call, factors, None, "nearest", {})
    axes = call.attribute("axes")
    odd = call.attribute("antialias", 0) or call.attribute("exclude_outside", 0)
    policy = call.attribute("keep_aspect_ratio_policy", "stretch")
    if odd or policy != "stretch" or (axes and list(axes) != list(range(call.rank()))):
        raise NoFunction
    mode, options = _interpolation(call)
    if call.name_of(3):
        return _resized(call, None, call.sizes_in(3), mode, options)
    return _resized(call, tuple(float(f) for f in call.wanted(2).tolist()), None, mode, options)


def _interpolation(call: Call) -> tuple[str, dict[str, Any]]:
    """Torch's mode and its options."""
    mode = call.attribute("mode", "nearest")
    places = call.attribute("coordinate_transformation_mode", "half_pixel")
    spatial = call.rank() - 2
    if mode == "nearest":
        rounds = call.attribute("nearest_mode", "round_prefer_floor")
        if (places, rounds) == ("asymmetric", "floor"):
            return "nearest", {}
        raise NoFunction
    mode = "bicubic" if mode == "cubic" and spatial == 2 else _MODES.get(spatial, "")
    if not mode or (call.attribute("mode") == "cubic" and mode != "bicubic"):
        raise NoFunction
    if mode == "bicubic" and call.attribute("cubic_coeff_a", -0.75) != -0.75:
        raise NoFunction
    if places == "align_corners":
        return mode, {"align_corners": True}
    if places in ("half_pixel", "pytorch_half_pixel"):
        return mode, {"align_corners": False}
    raise NoFunction


def _resized(
    call: Call, factors: tuple[float, ...] | None, sizes: Any, mode: str, options: dict[str, Any]
) -> fx.Node:
    source = call.data()
    if factors is not None:
        if factors[:2] != (1.0, 1.0) or not 3 <= len(factors) <= 5:
            raise NoFunction
        return call.main(F.interpolate, source, scale_factor=factors[2:], mode=mode, **options)
    if not 3 <= call.rank() <= 5:
        raise NoFunction
    if isinstance(sizes, tuple) and None not in (known := call.shape()[:2]) and sizes[:2] != known:
        raise NoFunction
    space = sizes[2:] if isinstance(sizes, tuple) else call.sizes(_behind_channels, sizes)
    return call.main(F.interpolate, source, size=space, mode=mode, **options)


def _behind_channels(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes[2:]


_ALONE: dict[str, Any] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}

FUNCTIONS: dict[str, Callable[[Call], Any]] = {
    **{name: functools.partial(_one, function) for name, function in _ALONE.items()},
    "Add": _sum,
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Div": _divided,
    "Dropout": _dropout,
    "Gelu": _gelu,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "Identity": _identity,
    "LeakyRelu": _leaky,
    "LogSoftmax": functools.partial(_softmax, torch.log_softmax),
    "Max": functools.partial(_two, torch.maximum),
    "MaxPool": _max_pool,
    "Min": functools.partial(_two, torch.minimum),
    "Mul": functools.partial(_two, torch.mul),
    "PRelu": _prelu,
    "Pow": functools.partial(_two, torch.pow),
    "ReduceMean": functools.partial(_reduced, torch.mean, 18),
    "ReduceSum": functools.partial(_reduced, torch.sum, 13),
    "Resize": _resize,
    "Softmax": functools.partial(_softmax, torch.softmax),
    "Sub": functools.partial(_two, torch.sub),
    "Sum": _sum,
    "Upsample": _upsample,
}
