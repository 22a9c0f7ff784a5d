"""A look at the channels of a graph: which ones only go together, and which always are one number.

Every element of a tensor belongs to a unit, a label as gauges have it (`bnfx.gauges.labels`): what
has one unit can only leave the graph as a whole. Unit 0 is the ground, which stays. A second map
tells which elements are constant: the bits of a float64 number, those of NaN where nothing is
known, so that operators that move elements are carried out on both maps alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnfx.gauges.labels import compact, rows_along
from bnfx.gauges.walk import Walk
from bnfx.graphs.constants import Values
from bnfx.graphs.shapes import Shapes
from bnfx.numbers import Floats, Ints
from bnfx.operators.table import Operator

#: The bits of "not constant".
_UNKNOWN = int(np.array(np.nan).view(np.int64))


@dataclass(frozen=True, eq=False)
class Layer:
    """A call whose weights read channels and write others."""

    #: The call.
    node: fx.Node
    #: What kind of layer it is.
    row: Operator
    #: (in,), unit of each input channel.
    x: Ints
    #: (out,), unit of each output channel.
    y: Ints
    #: (out,), what an output channel always is.
    gives: Floats
    #: (groups, out / groups, in / groups), whether a weight is not zero.
    reads: Tensor
    #: (in,), what an input channel always is; NaN where that is no one number.
    known: Floats
    #: Whether a constant image gives a constant image.
    even: bool
    #: Whether inputs are finite for finite inputs of the graph; NaN would pass weights of zero.
    finite: bool


@dataclass(frozen=True)
class Look:
    """One walk at the sizes of one run."""

    #: Units of the elements of each value.
    units: Walk
    #: Bits of what they always are.
    bits: Walk
    #: Which weights are not zero, by node; other looks need not ask again.
    reads: dict[fx.Node, Tensor]
    #: Calls that have weights, by node.
    layers: dict[fx.Node, Layer] = field(default_factory=dict)
    #: Nodes whose values may not be finite though the inputs are.
    loose: set[fx.Node] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.units.graph

    @property
    def shapes(self) -> Shapes:
        """Shapes of all values."""
        return self.units.shapes

    @property
    def values(self) -> Values:
        """Values of its constants."""
        return self.units.values

    @property
    def barred(self) -> Mapping[fx.Node, str]:
        """Nodes whose values must stay, and why."""
        return self.units.barred

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of what `node` gives."""
        return self.units.shape_of(node)

    def unknown(self, node: fx.Node) -> Any:
        """A map of "not constant" for what `node` gives, in containers like its own."""
        return pytree.tree_map(
            lambda m: unknown_map(m.shape) if isinstance(m, Tensor) else m,
            self.units.grounded(node),
        )

    def number(self, value: object) -> Tensor:
        """What a value always is, NaN elsewhere, with size 1 along axes where nothing changes."""
        return compact(self.bits.labels_of(value)).contiguous().view(torch.float64)

    def numbers(self, value: object, axis: int) -> Floats:
        """(channels,): what each channel of a value always is; NaN where that is no one number."""
        labels = self.bits.labels_of(value)
        rows, _ = rows_along(labels, [axis])
        one = np.where((rows == rows[:, :1]).all(1), rows[:, 0], _UNKNOWN)
        return np.array(np.broadcast_to(one, labels.shape[axis])).view(np.float64)


def unknown_map(shape: Any) -> Tensor:
    """No element is known."""
    return torch.full((), _UNKNOWN, dtype=torch.int64, device="cpu").expand(tuple(shape))


def bits_of(values: Tensor, shape: Any) -> Tensor:
    """A map of float64 numbers; what is not finite counts as not known."""
    wide = values.detach().double().cpu() + 0.0  # of the zeros, the positive one
    wide = torch.where(torch.isfinite(wide), wide, torch.nan)
    bits = torch.where(torch.isnan(wide), _UNKNOWN, wide.contiguous().view(torch.int64))
    return bits.expand(tuple(shape))
