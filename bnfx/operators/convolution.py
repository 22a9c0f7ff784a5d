"""Linear maps of one tensor, as convolutions of one shape that can be added."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bnfx.operators.geometry import Geometry
from bnfx.operators.table import Operator


@dataclass(frozen=True)
class Branch:
    """y = W * x + b with the geometry of a convolution; a linear layer has no spatial axes."""

    #: (out, in / groups, *kernel), float64.
    weight: Tensor
    #: (out,), float64.
    bias: Tensor
    #: One number for each spatial axis.
    stride: tuple[int, ...]
    #: Likewise, on both sides.
    padding: tuple[int, ...]
    #: Likewise.
    dilation: tuple[int, ...]
    #: Groups of channels.
    groups: int
    #: Rank of x and y; the channels are axis 1 of it, or the last for a linear layer.
    rank: int

    @staticmethod
    def of_layer(
        row: Operator, call: dict[str, Any], weight: Tensor | None, bias: Tensor | None
    ) -> Branch | None:
        """The map of a convolution or linear layer; None where its padding is uneven."""
        assert weight is not None
        geometry = Geometry.of_layer(row, call, weight, shifted=bias is not None)
        return None if geometry is None else Branch.of(geometry, weight, bias)

    @staticmethod
    def of(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> Branch:
        """Weight and bias in float64 under a geometry."""
        wide = weight.detach().cpu().double()
        summand = (
            torch.zeros(len(wide), device="cpu").double()
            if bias is None
            else bias.detach().cpu().double()
        )
        g = geometry
        return Branch(wide, summand, g.stride, g.padding, g.dilation, g.groups, len(g.kernel) + 2)

    @staticmethod
    def identity(shape: tuple[int, ...], factor: float) -> Branch:
        """Y = factor x, channels on axis 1."""
        spatial = max(0, len(shape) - 2)
        channels = shape[1] if len(shape) > 1 else 1
        ones = (1,) * spatial
        weight = torch.full((channels, 1, *ones), factor, dtype=torch.float64, device="cpu")
        zeros = torch.zeros(channels, dtype=torch.float64, device="cpu")
        return Branch(weight, zeros, ones, (0,) * spatial, ones, channels, len(shape))

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return len(self.weight)

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.weight.shape[1] * self.groups

    @property
    def taps(self) -> int:
        """Size of the kernel."""
        return prod(self.weight.shape[2:])

    def scaled(self, s: Tensor, t: Tensor) -> Branch:
        """The branch followed by y -> s y + t for each channel."""
        column = s.reshape(-1, *[1] * (self.weight.dim() - 1))
        return replace(self, weight=self.weight * column, bias=self.bias * s + t)

    def per_channel(self, constant: Tensor) -> Tensor | None:
        """(out,): a constant that is broadcast to y, where it depends on the channel alone."""
        shape = [1] * (self.rank - constant.dim()) + list(constant.shape)
        if (
            self.rank < 2
            or len(shape) != self.rank
            or any(n != 1 for i, n in enumerate(shape) if i != 1)
        ):
            return None
        if shape[1] not in (1, self.outputs):
            return None
        return constant.reshape(-1).expand(self.outputs)


def absorbed(branch: Branch, constant: Tensor) -> Branch | None:
    """The branch plus a constant for each channel."""
    summand = branch.per_channel(constant)
    return None if summand is None else replace(branch, bias=branch.bias + summand)


def joined(target: Branch, other: Branch) -> Branch | None:
    """The sum of two branches of one input, where `other` fits into the kernel of `target`."""
    same = (target.outputs, target.inputs, target.rank) == (other.outputs, other.inputs, other.rank)
    if not same or other.groups % target.groups or target.stride != other.stride:
        return None
    places = _places(target, other)
    if places is None:
        return None
    weight = target.weight.clone()
    dense = _regrouped(other, target.groups)
    view = weight[(slice(None), slice(None), *places)]
    weight[(slice(None), slice(None), *places)] = view + dense
    return replace(target, weight=weight, bias=target.bias + other.bias)


def _places(target: Branch, other: Branch) -> tuple[slice, ...] | None:
    """Where each tap of `other` falls among those of `target`; None where one falls beside."""
    places = []
    axes = zip(
        target.weight.shape[2:],
        other.weight.shape[2:],
        target.padding,
        other.padding,
        target.dilation,
        other.dilation,
        strict=True,
    )
    for k, m, p, q, d, e in axes:
        if 2 * p - d * (k - 1) != 2 * q - e * (m - 1):
            return None  # output sizes differ at some input size
        first, step = p - q, e if m > 1 else d
        if first % d or step % d or first < 0:
            return None
        start, jump = first // d, step // d
        stop = start + jump * (m - 1)
        if stop >= k:
            return None
        places.append(slice(start, stop + 1, jump))
    return tuple(places)


def _regrouped(branch: Branch, groups: int) -> Tensor:
    """The weight with fewer groups, zeros between the channels that are not connected."""
    if branch.groups == groups:
        return branch.weight
    out, narrow = branch.weight.shape[:2]
    weight = torch.zeros(
        out, branch.inputs // groups, *branch.weight.shape[2:], device="cpu"
    ).double()
    channel = torch.arange(out, device="cpu")
    old, new = channel // (out // branch.groups), channel // (out // groups)
    start = old * narrow - new * (branch.inputs // groups)
    weight[channel[:, None], start[:, None] + torch.arange(narrow, device="cpu")] = branch.weight
    return weight


def followed(first: Branch, second: Branch, geometry: Geometry) -> Branch:
    """`second` behind `first` as one map, whose geometry is `first.then(second)`.

    W[o, i, d1 a + s1 d2 b] = sum over c, b of W2[o, c, b] W1[c, i, a], b = b2 + sum W2 b1.
    """
    groups, sizes = geometry.groups, geometry.kernel
    inner, outer = (_grouped(branch, groups) for branch in (first, second))
    weight = torch.zeros(
        groups, outer.shape[1], inner.shape[2], *sizes, dtype=torch.float64, device="cpu"
    )
    taps = second.weight.shape[2:]
    shift = torch.zeros(groups, outer.shape[1], dtype=torch.float64, device="cpu")
    bias = first.bias.reshape(groups, -1, 1)
    for at, tap in enumerate(itertools.product(*map(range, taps))):
        factor = outer.flatten(3)[..., at] if taps else outer
        places = tuple(
            slice((start := s * d * j // step), start + e * (k - 1) // step + 1, max(e // step, 1))
            for s, d, j, step, e, k in zip(
                first.stride,
                second.dilation,
                tap,
                geometry.dilation,
                first.dilation,
                first.weight.shape[2:],
                strict=True,
            )
        )
        product = (factor @ inner.flatten(2)).reshape(*weight.shape[:3], *inner.shape[3:])
        weight[(slice(None), slice(None), slice(None), *places)] += product
        shift += (factor @ bias).squeeze(2)
    return Branch.of(geometry, weight.flatten(0, 1), second.bias + shift.flatten())


def laid(branch: Branch, geometry: Geometry) -> Branch:
    """The same map under a geometry whose kernel holds that of `branch`."""
    dense = _regrouped(branch, geometry.groups)
    weight = torch.zeros(*dense.shape[:2], *geometry.kernel, dtype=torch.float64, device="cpu")
    places = tuple(
        slice((start := (wide - p) // step), start + d * (k - 1) // step + 1, max(d // step, 1))
        for wide, p, step, d, k in zip(
            geometry.padding,
            branch.padding,
            geometry.dilation,
            branch.dilation,
            dense.shape[2:],
            strict=True,
        )
    )
    weight[(slice(None), slice(None), *places)] = dense
    return Branch.of(geometry, weight, branch.bias)


def _grouped(branch: Branch, groups: int) -> Tensor:
    """(groups, out / groups, in / groups, *kernel)."""
    weight = _regrouped(branch, groups)
    return weight.reshape(groups, -1, *weight.shape[1:])
