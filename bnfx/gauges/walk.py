"""A walk through an inference graph: what it knows so far, and what rules ask of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnfx.errors import FoldError
from bnfx.gauges.constraints import Cause, Constraints, Demand
from bnfx.gauges.labels import array, ground_map, rows_along
from bnfx.graphs.constants import Values
from bnfx.graphs.shapes import Shapes, is_tensor
from bnfx.numbers import Ints


class Opaque(Exception):
    """The rule of an operator does not fit this call."""


@dataclass(frozen=True)
class FoldOptions:
    """What folding may do besides: `bnfx.fold_bn` says more of each."""

    #: Make one convolution of convolutions and identities of one input that are added.
    merge_branches: bool = True
    #: Let bounds of ReLU, ReLU6, Hardtanh and clamp carry a gauge, one for each channel.
    thresholds: bool = False
    #: Let a constant map behind a convolution that pads zeros carry one, for one input size.
    border_maps: bool = False
    #: Make one layer of linear maps in sequence where that costs less.
    merge_linear: bool = True
    #: Drop channels that are zero or constant, or that nobody reads.
    drop_dead: bool = False
    #: The width that the target rounds to.
    block: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise FoldError(f"block={self.block!r} is no width; give 1 or more")


@dataclass(frozen=True)
class Walk:
    """One walk at the sizes of `shapes`; it writes its demands into `found`."""

    #: The inference graph.
    graph: fx.Graph
    #: Fake values of its nodes.
    shapes: Shapes
    #: Values of its constants.
    values: Values
    #: Labels and demands.
    found: Constraints
    #: Nodes whose values must stay, and what they are.
    barred: Mapping[fx.Node, str]
    #: What may carry a gauge though it costs something.
    options: FoldOptions
    #: Nodes whose labels are to be noted.
    watched: Collection[fx.Node] = ()
    #: Node -> the labels of what it gives, in containers like its own.
    maps: dict[fx.Node, Any] = field(default_factory=dict)
    #: Nodes that depend on elements of an input.
    data: set[fx.Node] = field(default_factory=set)

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of what `node` gives; where it is unknown, no rule fits."""
        value = self.shapes.values.get(node)
        if not is_tensor(value):
            raise Opaque
        return tuple(int(n) for n in value.shape)

    def labels_of(self, value: object) -> Tensor:
        """The labels of a floating-point tensor."""
        if not isinstance(value, fx.Node):
            raise Opaque
        labels, fake = self.maps.get(value), self.shapes.values.get(value)
        if not isinstance(labels, Tensor) or not is_tensor(fake) or not fake.is_floating_point():
            raise Opaque
        return labels

    def grounded(self, node: fx.Node) -> Any:
        """A map of the ground for what `node` gives, in containers like its own."""
        value = self.shapes.values.get(node)
        if is_tensor(value):
            return ground_map([int(n) for n in value.shape])
        if isinstance(value, tuple | list | dict):
            return pytree.tree_map(lambda v: ground_map(v.shape) if is_tensor(v) else None, value)
        return None

    def ground_inputs(self, node: fx.Node, words: str) -> None:
        """Demand the ground of all that `node` reads."""
        for value in node.all_input_nodes:
            for leaf in pytree.tree_leaves(self.maps.get(value)):
                if isinstance(leaf, Tensor):
                    self.found.ground(array(leaf), Cause(node, words))

    def channels(self, labels: Tensor, axis: int, cause: Cause) -> Ints:
        """One label for each channel; the others of a channel are made equal to it."""
        return self.rows(labels, [axis], cause)

    def rows(self, labels: Tensor, axes: Sequence[int], cause: Cause) -> Ints:
        """One label for each place along `axes`; the others of a place are made equal to it."""
        if any(not 0 <= axis < labels.dim() for axis in axes):  # of assumed ranks
            raise Opaque
        if 0 in labels.shape:  # of an empty batch, or of no channels
            raise Opaque
        rows, sizes = rows_along(labels, axes)
        first = rows[:, 0]
        if rows.shape[1] > 1:
            differ = rows != first[:, None]
            count = self.found.count
            keys = np.unique((first[:, None] * count + rows)[differ])
            self.found.demand(Demand.SAME, keys // count, keys % count, cause=cause)
        spread = [labels.shape[axis] for axis in axes]
        return np.array(np.broadcast_to(first.reshape(sizes), spread).reshape(-1))

    def unshifted(self, labels: Ints, cause: Cause, *, soft: bool = False) -> None:
        """Demand d = 0."""
        used = np.unique(labels)
        self.found.demand(Demand.UNSHIFTED, used[used > 0], cause=cause, soft=soft)

    def positive(self, labels: Ints, cause: Cause, *, soft: bool = False) -> None:
        """Demand a > 0."""
        used = np.unique(labels)
        self.found.demand(Demand.POSITIVE, used[used > 0], cause=cause, soft=soft)
