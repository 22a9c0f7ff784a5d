"""Layers with weights in one form, whoever they come from: a torch graph or an ONNX file.

A layer holds its weights and can be applied to any input, so that a layer of a file is
compared with the layer of the reference on equal input, and its weights one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnfx.numbers import Array

Kind = Literal["conv", "conv_transpose", "linear", "batch_norm", "layer_norm"]

#: Parts of a layer that are compared, in order.
PARTS = ("weight", "bias", "mean", "var")


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; one entry for each spatial axis."""

    #: Steps.
    stride: tuple[int, ...]
    #: Zeros (or cropped results, where transposed) before the first element.
    begin: tuple[int, ...]
    #: Likewise behind the last.
    end: tuple[int, ...]
    #: Distances within the kernel.
    dilation: tuple[int, ...]
    #: Groups of channels.
    groups: int = 1
    #: Added at the end, of a transposed convolution.
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer."""

    #: What it is.
    kind: Kind
    #: Module path in the reference, or the node of the file.
    name: str
    #: "weight", "bias", "mean" and "var" in float64, as far as it has them; the weights of a file's
    #: convolutions and linear layers in the dtype they are stored in. A convolution's weight is
    #: (out, in / groups, ...), transposed (in, out / groups, ...), a linear one's (out, in).
    parts: Mapping[str, Tensor]
    #: Part -> its name in the reference or file.
    names: Mapping[str, str] = field(default_factory=dict)
    #: Of a convolution.
    geometry: Geometry | None = None
    #: Of a normalisation.
    eps: float = 0.0
    #: How many trailing axes a layer norm covers.
    axes: int = 1
    #: Whether a BatchNorm uses batch statistics.
    training: bool = False
    #: Key of its input.
    x: str = ""
    #: Key of its output.
    y: str = ""
    #: Key of the output that its input is, where that is a layer's.
    source: str = ""
    #: Number of axes of its output; 0 where unknown.
    rank: int = 0
    #: Parts that are parameters of the source, not changed by folding.
    untouched: frozenset[str] = frozenset()
    #: Part -> how many roundings come of one in each step, where the reference computes it.
    conditions: Mapping[str, float] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        weight = self.parts["weight"]
        if self.kind == "conv_transpose" and self.geometry is not None:
            return weight.shape[1] * self.geometry.groups
        return weight.shape[0]

    @property
    def signature(self) -> tuple[object, ...]:
        """What two layers must share to be the same one."""
        groups = self.geometry.groups if self.geometry is not None else 1
        return (self.kind, tuple(self.parts["weight"].shape), groups)

    def part(self, name: str) -> Tensor:
        """A part; zeros for a bias that is not there, ones for other missing parts."""
        if name in self.parts:
            return self.parts[name]
        like = torch.zeros if name in ("bias", "mean") else torch.ones
        shape = self.parts["weight"].shape if self.kind == "layer_norm" else (self.channels,)
        return like(shape, dtype=torch.float64)


def by_channel(layer: Layer, part: str) -> Tensor:
    """A part as (output channels, everything else), in float64."""
    value = layer.part(part).double()
    if part == "weight" and layer.kind == "conv_transpose" and layer.geometry is not None:
        groups = layer.geometry.groups
        value = value.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return value.reshape(layer.channels, -1)


def apply(layer: Layer, x: Tensor) -> Tensor:
    """The layer's output, in the dtype of `x`.

    Raises:
        RuntimeError, ValueError: `x` does not fit the layer.
    """
    weight, bias = (layer.part(name).to(x.dtype) for name in ("weight", "bias"))
    if layer.kind == "linear":
        return F.linear(x, weight, bias)
    if layer.kind == "layer_norm":
        return F.layer_norm(x, weight.shape, weight, bias, layer.eps)
    if layer.kind == "batch_norm":
        mean, var = (layer.part(name).to(x.dtype) for name in ("mean", "var"))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, layer.eps)
    assert layer.geometry is not None
    return _convolve(x, weight, bias, layer.geometry, transposed=layer.kind == "conv_transpose")


def rounding_scale(layer: Layer, x: Tensor) -> Tensor:
    """What roundings come to in each output: sqrt((w^2 * x^2 + b^2) max(1, K / 6)).

    Small outputs that are sums of large terms err by this, and not by their own size. K is the
    number of products in a sum: summed one after the other, the partial sum after i of them has the
    mean square i / K of the whole, and each step rounds it with a variance of 1 / 3 unit squared.
    """
    squares = {part: layer.part(part).double().square() for part in ("weight", "bias")}
    geometry = layer.geometry
    power = apply(Layer(layer.kind, "", squares, geometry=geometry), x.square())
    terms = layer.parts["weight"].numel() / layer.channels
    return (power * max(1.0, terms / 6)).sqrt()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, g: Geometry, *, transposed: bool) -> Tensor:
    rank = len(g.stride)
    if not 1 <= rank <= 3 or x.dim() not in (rank + 1, rank + 2):
        raise ValueError(f"an input of rank {x.dim()} does not fit {rank} spatial axes")
    if not transposed:
        pads = [n for pair in zip(reversed(g.begin), reversed(g.end), strict=True) for n in pair]
        convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return convolution(F.pad(x, pads), weight, bias, g.stride, 0, g.dilation, g.groups)
    opposite = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    full = opposite(x, weight, bias, g.stride, 0, 0, g.groups, g.dilation)
    for axis in range(rank):
        added = g.output_padding[axis] if g.output_padding else 0
        keep = full.shape[axis - rank] - g.begin[axis] - g.end[axis] + added
        full = _padded_end(full, axis - rank, g.begin[axis] + keep, bias, rank)
        full = full.narrow(axis - rank, g.begin[axis], keep)
    return full


def _padded_end(full: Tensor, axis: int, size: int, bias: Tensor, rank: int) -> Tensor:
    """`full` with at least `size` elements along `axis`; those behind the end hold the bias."""
    missing = size - full.shape[axis]
    if missing <= 0:
        return full
    shape, view = list(full.shape), [1] * full.dim()
    shape[axis], view[-rank - 1] = missing, -1
    return torch.cat((full, bias.view(view).expand(shape)), axis)


def compose(layer: Layer, norm: Layer) -> Layer:
    """A layer with the BatchNorm behind it folded in: W' = s W, b' = s (b - mean) + beta."""
    scale = norm.part("weight") / (norm.part("var") + norm.eps).sqrt()
    bias = scale * (layer.part("bias") - norm.part("mean")) + norm.part("bias")
    weight = layer.parts["weight"]
    if layer.kind == "conv_transpose" and layer.geometry is not None:
        grouped = weight.unflatten(0, (layer.geometry.groups, -1))
        factors = scale.reshape(layer.geometry.groups, 1, -1, *[1] * (weight.dim() - 2))
        folded = (grouped * factors).flatten(0, 1)
    else:
        folded = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    parts = {"weight": folded, "bias": bias}
    return replace(layer, parts=parts, y=norm.y, untouched=frozenset[str]())


def neighbours(layers: Sequence[Layer]) -> list[tuple[Layer, Layer]]:
    """Every layer with the BatchNorm directly behind it, where it can be folded into it."""
    readers = Counter(layer.source for layer in layers)
    before = {layer.y: layer for layer in layers if layer.kind not in ("batch_norm", "layer_norm")}
    pairs = []
    for norm in layers:
        layer = before.get(norm.source)
        if norm.kind != "batch_norm" or norm.training or layer is None or readers[layer.y] != 1:
            continue
        spatial = len(layer.geometry.stride) if layer.geometry is not None else 0
        flat = all(part.dim() == 1 for part in norm.parts.values())
        if flat and layer.channels == norm.channels and norm.rank == spatial + 2:
            pairs.append((layer, norm))
    return pairs


def composed(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with every BatchNorm folded into the layer directly before it."""
    into = {id(layer): norm for layer, norm in neighbours(layers)}
    gone = {id(norm) for norm in into.values()}
    return [
        compose(layer, into[id(layer)]) if id(layer) in into else layer
        for layer in layers
        if id(layer) not in gone
    ]


def as_tensor(array: Array) -> Tensor:
    """The array as a tensor, in float32 where its dtype is none of torch's."""
    known = array.dtype.kind in "fiub" and array.dtype.itemsize <= 8
    plain = np.ascontiguousarray(array if known else array.astype(np.float32))
    return torch.from_numpy(plain if plain.flags.writeable else plain.copy())


def samples(value: Tensor, count: int = 2048) -> Tensor:
    """At most `count` elements of a tensor, evenly spread, in float64."""
    flat = value.detach().reshape(-1)
    step = max(1, math.ceil(flat.numel() / count))
    # An odd step that shares no factor with powers of two meets every channel.
    return flat[:: step | 1 if step > 1 else 1].to("cpu", torch.float64, copy=True)
