"""Operators of ONNX in float64 that onnx's reference computes slowly, wrongly or not at all.

The meaning of each is that of its version in the file's operator set: attributes that are not there
have that version's defaults, which onnx's own reference implementation takes from the newest one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx.reference.op_run import OpRun
from torch import Tensor

from bnfx.numbers import Array
from bnfx.verification.file_calls import Call, Computed
from bnfx.verification.file_recurrent import gru, lstm, rnn
from bnfx.verification.file_resizing import resize, roi_align, upsample
from bnfx.verification.layers import Geometry, Layer, apply, as_tensor

OPERATORS: list[type[OpRun]] = []


def _operator(*names: str) -> Callable[[Callable[..., Computed]], Callable[..., Computed]]:
    """Register a function of a `Call` and the inputs as the evaluator of operators."""

    def register(function: Callable[..., Computed]) -> Callable[..., Computed]:
        for name in names:
            kind = type(name, (_Evaluated,), {"function": staticmethod(function), "name": name})
            OPERATORS.append(kind)
        return function

    return register


class _Evaluated(OpRun):
    """An operator computed by a function of this file."""

    op_domain = ""
    name: str
    function: Callable[..., Computed]

    def __init__(self, onnx_node: Any, run_params: dict[str, Any], schema: Any = None) -> None:  # noqa: ARG002  # the newest
        self.opset = run_params["opsets"][onnx_node.domain]
        versioned = onnx.defs.get_schema(onnx_node.op_type, self.opset)
        super().__init__(onnx_node, run_params, versioned)

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        call = Call(attributes, self.opset, len(self.onnx_node.output))
        given = [value if value is None else as_tensor(value) for value in inputs]
        results = self.function(call, *given)
        several = results if isinstance(results, tuple) else (results,)
        return tuple(r.numpy() if isinstance(r, Tensor) else r for r in several)


def _padding(
    call: Call, size: Sequence[int], window: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and behind each axis.

    With SAME, an axis of n elements gives ceil(n / stride) results (ONNX, operator Conv).
    """
    automatic, rank = call["auto_pad"], len(size)
    if automatic in (None, "", "NOTSET"):
        flat = call.each("pads", 0, 2 * rank)
        return flat[:rank], flat[rank:]
    if automatic == "VALID":
        return (0,) * rank, (0,) * rank
    total = [
        max(0, (-(-n // s) - 1) * s + w - n) for n, s, w in zip(size, stride, window, strict=True)
    ]
    return _halves(total, upper=automatic == "SAME_UPPER")


def _halves(total: Sequence[int], *, upper: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Each number in two halves; `upper` gives the odd one to the second."""
    small = tuple(n // 2 for n in total)
    large = tuple(n - s for n, s in zip(total, small, strict=True))
    return (small, large) if upper else (large, small)


def _spread(call: Call, kernel: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Strides, dilations and the sizes of the dilated windows."""
    rank = len(kernel)
    stride, dilation = call.each("strides", 1, rank), call.each("dilations", 1, rank)
    return stride, dilation, tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))


@_operator("Conv")
def _conv(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    stride, dilation, window = _spread(call, w.shape[2:])
    begin, end = _padding(call, x.shape[2:], window, stride)
    geometry = Geometry(stride, begin, end, dilation, call["group"])
    return _applied("conv", x, w, b, geometry)


@_operator("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """With a shape to reach, the padding is what is too much (ONNX, operator ConvTranspose)."""
    stride, dilation, window = _spread(call, w.shape[2:])
    size, rank, automatic = x.shape[2:], w.dim() - 2, call["auto_pad"]
    added = call.each("output_padding", 0, rank)
    begin, end = (
        _padding(call, size, window, stride) if automatic == "NOTSET" else ((0,) * rank,) * 2
    )
    wanted = call.each("output_shape", 0, rank)[-rank:]
    if automatic.startswith("SAME") and not any(wanted):
        wanted = tuple(n * s for n, s in zip(size, stride, strict=True))
    if any(wanted):
        full = [(n - 1) * s + w for n, s, w in zip(size, stride, window, strict=True)]
        over = [f + a - n for f, a, n in zip(full, added, wanted, strict=True)]
        begin, end = _halves([max(0, n) for n in over], upper=automatic == "SAME_UPPER")
        added = tuple(a + max(0, -n) for a, n in zip(added, over, strict=True))
    geometry = Geometry(stride, begin, end, dilation, call["group"], added)
    return _applied("conv_transpose", x, w, b, geometry)


def _applied(kind: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    parts = {"weight": w} | ({} if b is None else {"bias": b})
    return apply(Layer(kind, "", parts, geometry=geometry), x)


@dataclass(frozen=True)
class _Windows:
    """The windows of a pooling, their elements along the last axis."""

    #: What is in them; `fill` outside of the input.
    values: Tensor
    #: Which elements lie in the input, and which in it or its padding.
    inside: Tensor
    padded: Tensor
    #: Number of each element in the input, along its spatial axes.
    places: Tensor


def _windows(call: Call, x: Tensor, fill: float) -> _Windows:
    """Gather the windows; one that would start behind the input is none (ONNX, MaxPool)."""
    kernel, size = tuple(call["kernel_shape"]), x.shape[2:]
    stride, dilation, window = _spread(call, kernel)
    begin, end = _padding(call, size, window, stride)
    rank, values = len(size), x
    inside = padded = torch.ones((), dtype=torch.bool)
    places, flat = torch.zeros((), dtype=torch.int64), 1
    for axis in reversed(range(rank)):
        n, s, w = size[axis], stride[axis], window[axis]
        room = n + begin[axis] + end[axis] - w
        count = (-(-room // s) if call["ceil_mode"] else room // s) + 1
        if call["ceil_mode"] and (count - 1) * s >= n + begin[axis]:
            count -= 1
        steps = torch.arange(kernel[axis]) * dilation[axis]
        at = torch.arange(count)[:, None] * s - begin[axis] + steps
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = count, kernel[axis]
        here = (at >= 0) & (at < n)
        inside = inside & here.reshape(shape)
        padded = padded & (at < n + end[axis]).reshape(shape)
        places = places + (at.clamp(0, n - 1) * flat).reshape(shape)
        flat *= n
        taken = values.index_select(axis + 2, at.clamp(0, n - 1).reshape(-1))
        values = taken.unflatten(axis + 2, (count, kernel[axis])).movedim(axis + 3, 2 + rank)
    values = torch.where(inside, values, torch.as_tensor(fill, dtype=x.dtype))
    last = -rank
    return _Windows(
        values.flatten(last),
        *(t.expand(values.shape[2:]).flatten(last) for t in (inside, padded, places)),
    )


@_operator("MaxPool")
def _max_pool(call: Call, x: Tensor) -> Computed:
    low = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    found = _windows(call, x, low)
    best, which = found.values.max(-1)
    if call.outputs == 1:
        return best
    place = found.places.expand(found.values.shape).gather(-1, which[..., None])[..., 0]
    if call["storage_order"]:
        place = _columns_first(place, x.shape[2:])
    whole = torch.arange(x.shape[0] * x.shape[1]) * math.prod(x.shape[2:])
    return best, place + whole.reshape(*x.shape[:2], *[1] * (x.dim() - 2))


def _columns_first(place: Tensor, size: Sequence[int]) -> Tensor:
    """Places counted along the last axis first, counted along the first axis first."""
    result, rest, factor = torch.zeros_like(place), place, math.prod(size)
    for n in reversed(size):
        factor //= n
        result, rest = result + rest % n * factor, rest // n
    return result


@_operator("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    found = _windows(call, x, 0.0)
    return found.values.sum(-1) / (found.padded if call["count_include_pad"] else found.inside).sum(
        -1
    )


@_operator("LpPool")
def _lp_pool(call: Call, x: Tensor) -> Tensor:
    return _windows(call, x, 0.0).values.abs().pow(call["p"]).sum(-1).pow(1 / call["p"])


@_operator("GlobalMaxPool")
def _global_max_pool(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001  # it has no attributes
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@_operator("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:  # noqa: ARG001  # it has no attributes
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@_operator("GlobalLpPool")
def _global_lp_pool(call: Call, x: Tensor) -> Tensor:
    axes = tuple(range(2, x.dim()))
    return x.abs().pow(call["p"]).sum(axes, keepdim=True).pow(1 / call["p"])


@_operator("BatchNormalization")
def _batch_norm(call: Call, x: Tensor, *parts: Tensor) -> Computed:
    """Statistics of the batch where training_mode says so; before opset 14 outputs say so.

    Parameters with several axes are opset 7's `spatial=0`.
    """
    scale, bias, mean, var = (p.reshape(*p.shape, *[1] * (x.dim() - 1 - p.dim())) for p in parts)
    trains = call["training_mode"] or (call.opset < 14 and call.outputs > 1)
    if not trains:
        even: Tensor = (x - mean) / (var + call["epsilon"]).sqrt() * scale + bias
        return even
    if call.opset < 14:
        raise NotImplementedError("BatchNormalization that trains, before opset 14")
    axes = [axis for axis in range(x.dim()) if axis != 1]
    own_var, own_mean = torch.var_mean(x, axes, correction=0)
    view, share = (-1, *[1] * (x.dim() - 2)), call["momentum"]
    unit = (own_var.reshape(view) + call["epsilon"]).rsqrt()
    y = (x - own_mean.reshape(view)) * unit * scale + bias
    old = [part * share for part in parts[2:]]
    return (y, old[0] + own_mean * (1 - share), old[1] + own_var * (1 - share))[: call.outputs]


@_operator("Scatter")
def _scatter(call: Call, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """The name of ScatterElements before opset 11."""
    size = data.shape[call["axis"]]
    return data.scatter(call["axis"], indices.long() % size, updates)


@_operator("LpNormalization")
def _lp_normalization(call: Call, x: Tensor) -> Tensor:
    norm = x.abs().pow(call["p"]).sum(call["axis"], keepdim=True).pow(1 / call["p"])
    return torch.where(norm == 0, 0.0, x / norm)


@_operator("MeanVarianceNormalization")
def _mean_variance(call: Call, x: Tensor) -> Tensor:
    axes = call.each("axes", 0, x.dim())
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    unit: Tensor = (x - mean) / (var.sqrt() + 1e-9)
    return unit


@_operator("LRN")
def _lrn(call: Call, x: Tensor) -> Tensor:
    """Channel c is divided by a power of the squares of c - (size-1)//2 to c + ceil((size-1)/2)."""
    before = (call["size"] - 1) // 2
    around = [0, 0] * (x.dim() - 2) + [before, call["size"] - 1 - before]
    squares = F.pad(x.square(), around).unfold(1, call["size"], 1).sum(-1)
    power: Tensor = (call["bias"] + call["alpha"] / call["size"] * squares) ** call["beta"]
    return x / power


def _row_wise(function: Callable[[Tensor], Tensor]) -> Callable[[Call, Tensor], Tensor]:
    """A function of rows: along one axis from opset 13 on, before that along it and all behind."""

    def computed(call: Call, x: Tensor) -> Tensor:
        if call.opset >= 13:
            return function(x.movedim(call["axis"], -1)).movedim(-1, call["axis"])
        axis = call["axis"] + (x.dim() if call["axis"] < 0 else 0)
        return function(x.reshape(math.prod(x.shape[:axis]), -1)).reshape(x.shape)

    return computed


_operator("Softmax")(_row_wise(lambda rows: rows.softmax(-1)))
_operator("LogSoftmax")(_row_wise(lambda rows: rows.log_softmax(-1)))
_operator("Hardmax")(_row_wise(lambda rows: F.one_hot(rows.argmax(-1), rows.shape[-1]).to(rows)))


@_operator("DequantizeLinear")
def _dequantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(x - zero) * scale, with one of each for the whole, an axis, or the blocks of an axis."""
    spread = _along(call, x)
    return (x.double() - (0 if zero is None else spread(zero).double())) * spread(scale)


def _along(call: Call, x: Tensor) -> Callable[[Tensor], Tensor]:
    """How a scale lies along `x`."""

    def spread(value: Tensor) -> Tensor:
        if value.dim() == 0 or value.numel() == 1:
            return value.reshape(())
        axis = (1 if call["axis"] is None else call["axis"]) % x.dim()  # opset 10 has none
        if call["block_size"]:
            return value.repeat_interleave(call["block_size"], axis).narrow(axis, 0, x.shape[axis])
        return value.reshape(*[1] * axis, -1, *[1] * (x.dim() - axis - 1))

    return spread


_operator("LSTM")(lstm)
_operator("GRU")(gru)
_operator("RNN")(rnn)
_operator("Upsample")(upsample)
_operator("Resize")(resize)
_operator("RoiAlign")(roi_align)
