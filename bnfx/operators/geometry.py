"""What convolutions read for each output, in sequence and side by side, without their weights.

A convolution (k1, s1, p1, d1, b1) and then another (k2, s2, p2, d2) are one if and only if the
second pads nothing, or b1 = 0 and p1 >= d1 (k1 - 1): then what the first would give beyond its
border is the zero that the second pads. The whole has taps at d1 i + s1 d2 j, the stride s1 s2 and
the padding p1 + s1 p2, and its output has the same size for every input: floors nest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import gcd, prod
from typing import Any

from torch import Tensor

from bnfx.operators.table import Operator


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution; a linear layer has no spatial axes."""

    inputs: int
    outputs: int
    groups: int
    #: One number for each spatial axis, as in what follows.
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    #: On both sides.
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    #: Whether the output may be other than zero where all that is read is zero.
    shifted: bool

    @staticmethod
    def of_layer(
        row: Operator, call: dict[str, Any], weight: Tensor, *, shifted: bool
    ) -> Geometry | None:
        """That of a convolution or linear layer; None where its padding is uneven.

        Nor is there one of no channels, or where a linear layer takes a vector as its weight.
        """
        spatial, groups = row.spatial or 0, int(call["groups"])
        if weight.dim() != spatial + 2 or not weight.numel():
            return None
        kernel = tuple(weight.shape[2:])
        dilation = numbers(call["dilation"], spatial)
        padding = call["padding"]
        if padding == "valid":
            padding = 0
        if padding == "same":
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(r % 2 for r in reach):
                return None
            padding = tuple(r // 2 for r in reach)
        return Geometry(
            inputs=weight.shape[1] * groups,
            outputs=weight.shape[0],
            groups=groups,
            kernel=kernel,
            stride=numbers(call["stride"], spatial),
            padding=numbers(padding, spatial),
            dilation=dilation,
            shifted=shifted,
        )

    @staticmethod
    def rows(outputs: int, inputs: int, *, shifted: bool) -> Geometry:
        """That of a linear layer."""
        return Geometry(inputs, outputs, 1, (), (), (), (), shifted)

    @staticmethod
    def window(channels: int, kernel: tuple[int, ...], **more: tuple[int, ...]) -> Geometry:
        """A window over each channel for itself; of size one it is the identity."""
        ones = (1,) * len(kernel)
        usual = {"stride": ones, "padding": (0,) * len(kernel), "dilation": ones} | more
        return Geometry(channels, channels, channels, kernel, **usual, shifted=False)

    def then(self, after: Geometry) -> Geometry | None:
        """This one and `after` behind it; None where that is no convolution."""
        reaches = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        seen = any(
            pad and (self.shifted or mine < reach)
            for pad, mine, reach in zip(after.padding, self.padding, reaches, strict=True)
        )
        if seen or self.outputs != after.inputs:
            return None
        steps = [s * d for s, d in zip(self.stride, after.dilation, strict=True)]
        dilation = tuple(
            _lattice((d, k), (step, m))
            for d, k, step, m in zip(self.dilation, self.kernel, steps, after.kernel, strict=True)
        )
        return Geometry(
            inputs=self.inputs,
            outputs=after.outputs,
            groups=gcd(self.groups, after.groups),
            kernel=tuple(
                (reach + step * (m - 1)) // d + 1
                for reach, step, m, d in zip(reaches, steps, after.kernel, dilation, strict=True)
            ),
            stride=tuple(a * b for a, b in zip(self.stride, after.stride, strict=True)),
            padding=tuple(
                p + s * q for p, s, q in zip(self.padding, self.stride, after.padding, strict=True)
            ),
            dilation=dilation,
            shifted=self.shifted or after.shifted,
        )

    def beside(self, other: Geometry) -> Geometry | None:
        """The sum of this one and `other`, of one input; None where that is no convolution."""
        if (self.inputs, self.outputs, self.stride) != (other.inputs, other.outputs, other.stride):
            return None
        axes = []
        for k, p, d, m, q, e in zip(
            self.kernel,
            self.padding,
            self.dilation,
            other.kernel,
            other.padding,
            other.dilation,
            strict=True,
        ):
            if 2 * p - d * (k - 1) != 2 * q - e * (m - 1):
                return None  # output sizes differ at some input size
            step = gcd(_lattice((d, k), (e, m)), p - q) if k * m > 1 else 1
            pad = max(p, q)
            axes.append((max(d * (k - 1), e * (m - 1)) // step + 1, pad, step))
        kernel, padding, dilation = zip(*axes, strict=True) if axes else ((), (), ())
        return replace(
            self,
            groups=gcd(self.groups, other.groups),
            kernel=kernel,
            padding=padding,
            dilation=dilation,
            shifted=self.shifted or other.shifted,
        )

    @property
    def taps(self) -> int:
        """Size of the kernel."""
        return prod(self.kernel)

    def cost(self, places: float, block: int, *, first: bool) -> float:
        """Multiplications at so many places, with widths rounded up to what a target computes.

        Of the graph's input (`first`) fewer channels than a block are read as they are. A window
        over each channel for itself reads no other.
        """
        if self.groups == self.inputs == self.outputs:
            return places * self.taps * _up(self.outputs, block)
        inputs = self.inputs if first and self.inputs < block else _up(self.inputs, block)
        return places * self.taps * _up(self.outputs, block) * inputs / self.groups


def _lattice(*axes: tuple[int, int]) -> int:
    """The step that all taps of some axes, each (step, count), are on."""
    return reduce(gcd, (step for step, count in axes if count > 1), 0) or 1


def _up(width: int, block: int) -> int:
    return -(-width // block) * block


def numbers(value: Any, count: int) -> tuple[int, ...]:
    """An argument such as `padding`, a number or one for each axis, for each axis."""
    if isinstance(value, int):
        return (value,) * count
    found = tuple(int(v) for v in value)
    return found if len(found) == count else found * count
