"""Operators of ONNX that onnx's reference implementation computes slowly, computed by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx.reference.op_run import OpRun

from bnfx.numbers import Array
from bnfx.verification.layers import Geometry, Layer, apply, as_tensor


def _given(value: Any, default: int, rank: int) -> tuple[int, ...]:
    return tuple(value) if value is not None and len(value) else (default,) * rank


def _pads(
    automatic: str | None,
    pads: Any,
    rank: int,
    size: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and behind each axis.

    With SAME, an axis of n elements gives ceil(n / stride) results (ONNX, operator Conv).
    """
    if automatic in (None, "", "NOTSET"):
        flat = _given(pads, 0, 2 * rank)
        return flat[:rank], flat[rank:]
    if automatic == "VALID":
        return (0,) * rank, (0,) * rank
    total = [
        max(0, (-(-n // s) - 1) * s + w - n) for n, s, w in zip(size, stride, window, strict=True)
    ]
    small = tuple(n // 2 for n in total)
    large = tuple(n - s for n, s in zip(total, small, strict=True))
    return (small, large) if automatic == "SAME_UPPER" else (large, small)


class Conv(OpRun):
    """Convolution in the dtype of its input."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Any = None,
        group: int | None = None,
        kernel_shape: Any = None,  # noqa: ARG002  # the weight tells
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[Array]:
        rank = w.ndim - 2
        stride, dilation = _given(strides, 1, rank), _given(dilations, 1, rank)
        window = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:], strict=True)]
        begin, end = _pads(auto_pad, pads, rank, x.shape[2:], window, stride)
        geometry = Geometry(stride, begin, end, dilation, group or 1)
        return (_applied("conv", x, w, b, geometry),)


class ConvTranspose(OpRun):
    """Transposed convolution in the dtype of its input."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Any = None,
        group: int | None = None,
        kernel_shape: Any = None,  # noqa: ARG002  # the weight tells
        output_padding: Any = None,
        output_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[Array]:
        rank = w.ndim - 2
        if output_shape is not None and len(output_shape):
            raise NotImplementedError("ConvTranspose with output_shape")
        if auto_pad not in (None, "", "NOTSET", "VALID"):
            raise NotImplementedError(f"ConvTranspose with auto_pad={auto_pad}")
        flat = _given(pads, 0, 2 * rank) if auto_pad != "VALID" else (0,) * (2 * rank)
        geometry = Geometry(
            _given(strides, 1, rank),
            flat[:rank],
            flat[rank:],
            _given(dilations, 1, rank),
            group or 1,
            _given(output_padding, 0, rank),
        )
        return (_applied("conv_transpose", x, w, b, geometry),)


def _applied(kind: Any, x: Array, w: Array, b: Array | None, geometry: Geometry) -> Array:
    parts = {"weight": as_tensor(w)} | ({} if b is None else {"bias": as_tensor(b)})
    return np.asarray(apply(Layer(kind, "", parts, geometry=geometry), as_tensor(x)).numpy())


class MaxPool(OpRun):
    """Maximum over windows; the positions are not computed."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Any = None,
        kernel_shape: Any = None,
        pads: Any = None,
        storage_order: int | None = None,  # noqa: ARG002  # of the positions
        strides: Any = None,
    ) -> tuple[Array]:
        if len(self.onnx_node.output) > 1:
            raise NotImplementedError("MaxPool with positions")
        rank = x.ndim - 2
        stride, dilation = _given(strides, 1, rank), _given(dilations, 1, rank)
        window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_shape, strict=True)]
        begin, end = _pads(auto_pad, pads, rank, x.shape[2:], window, stride)
        if ceil_mode:
            end = _ceiled(x.shape[2:], begin, end, window, stride)
        flat = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
        low = float("-inf") if x.dtype.kind == "f" else int(torch.iinfo(as_tensor(x).dtype).min)
        padded = F.pad(as_tensor(x), flat, value=low)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        out = pool(padded, tuple(kernel_shape), stride, 0, dilation)
        return (np.asarray(out.numpy()),)


class AveragePool(OpRun):
    """Mean over windows."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Any = None,
        kernel_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[Array]:
        rank = x.ndim - 2
        stride = _given(strides, 1, rank)
        if any(d != 1 for d in _given(dilations, 1, rank)) or ceil_mode:
            raise NotImplementedError("AveragePool with dilations or ceil_mode")
        begin, end = _pads(auto_pad, pads, rank, x.shape[2:], kernel_shape, stride)
        flat = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        value = as_tensor(x)
        total = pool(F.pad(value, flat), tuple(kernel_shape), stride)
        if count_include_pad:
            return (np.asarray(total.numpy()),)
        share = pool(F.pad(torch.ones_like(value), flat), tuple(kernel_shape), stride)
        return (np.asarray((total / share).numpy()),)


def _ceiled(
    size: Sequence[int],
    begin: Sequence[int],
    end: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
) -> tuple[int, ...]:
    """Padding behind each axis so that a last, partial window counts, if it starts inside."""
    result = []
    for n, b, e, w, s in zip(size, begin, end, window, stride, strict=True):
        count = -(-(n + b + e - w) // s) + 1
        if (count - 1) * s >= n + b:
            count -= 1
        result.append(max(e, (count - 1) * s + w - n - b))
    return tuple(result)


OPERATORS = (Conv, ConvTranspose, MaxPool, AveragePool)
