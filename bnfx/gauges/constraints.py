"""What an inference graph demands of its gauges.

A gauge is the pair (a, d) of a tensor's channel: the rewritten graph carries x' = a (x + d) there.
Equal elements share one label; label 0 is the ground, a = 1 and d = 0. Scales are kept as log|a|
and as a sign, 0 for a > 0 and 1 for a < 0, so that every demand is a linear equation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import numpy as np
from torch import Tensor, fx

from bnfx.gauges.linear_system import LinearSystem, Rows, classes
from bnfx.numbers import Floats, Ints
from bnfx.operators.products import Product


class Kind(Enum):
    """What a site is, and so how its weights are rewritten."""

    AFFINE = auto()  # W' = a_o W / a_i, b' = a_o (b + d_o - sum W d_i)
    PRODUCT = auto()  # likewise, with a parameter; a bias is added
    NORM = auto()  # w' = a_o w, b' = a_o (b + d_o)
    BATCH_NORM = auto()  # y = s x + t: eliminated, or kept with gauges in its parameters
    SCALE = auto()  # y = k x: likewise
    SHIFT = auto()  # y = x + k: likewise
    MIRROR = auto()  # y = k - x: it stays, and k takes up any displacement


#: Layers whose weights take up a gauge of the input and another of the output.
LINEAR = (Kind.AFFINE, Kind.PRODUCT)
#: Sums and products with a constant.
CONSTANTS = (Kind.SCALE, Kind.SHIFT, Kind.MIRROR)


@dataclass(frozen=True, eq=False)
class Site:
    """A call whose parameters take up gauges."""

    #: The call.
    node: fx.Node
    #: How its parameters change.
    kind: Kind
    #: Labels of its input, one for each channel (for constants: each that differs).
    x: Ints
    #: Labels of its output, likewise.
    y: Ints
    #: Factor for each entry of `x`; empty where the site cannot be eliminated.
    s: Floats = field(default_factory=lambda: np.zeros(0))
    #: Summand for each entry of `x`.
    t: Floats = field(default_factory=lambda: np.zeros(0))
    #: The operand that takes the place of the call when it vanishes.
    source: fx.Node | None = None
    #: Name of the constant argument of SCALE and SHIFT.
    operand: str = ""
    #: A tensor with dtype and device of what is stored.
    like: Tensor | None = None
    #: For constants: which entry of `x` each element of the tensor has; 1 where equal.
    where: Tensor | None = None
    #: Value of the constant operand of SCALE and SHIFT, float64.
    constant: Tensor | None = None
    #: Mean of the input for each entry of `x` where it is known (BatchNorm), else empty.
    mean: Floats = field(default_factory=lambda: np.zeros(0))
    #: Standard deviation, likewise.
    std: Floats = field(default_factory=lambda: np.zeros(0))
    #: How a product is read.
    product: Product | None = None
    #: Sizes of the input behind the channels, where a border map may be needed.
    size: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cause:
    """Who demands something, in words for a report."""

    node: fx.Node
    words: str


@dataclass(frozen=True)
class Bounds:
    """A nonlinearity that clamps, whose bounds can carry a gauge."""

    #: Labels of its values, of size 1 along axes where they are equal.
    labels: Tensor
    #: Its lower bound, -inf without any.
    lower: float
    #: Its upper bound, inf without any.
    upper: float
    #: A tensor with dtype and device of its values.
    like: Tensor


class Demand(Enum):
    """The forms of equations; the unknowns are those of the labels i, j, k."""

    SAME = auto()  # (a, d) of i and j are equal
    SAME_SCALE = auto()  # a of i and j are equal
    POSITIVE = auto()  # a of i > 0
    UNSHIFTED = auto()  # d of i = 0
    GATE = auto()  # log a_i = log a_j + c log a_k
    SUM = auto()  # d_i = b d_j + c d_k


@dataclass(frozen=True)
class Batch:
    """Equations of one form and cause; soft ones are only kept where nothing is lost by it."""

    demand: Demand
    labels: tuple[Ints, ...]
    factors: tuple[Floats | float, ...]
    cause: Cause
    soft: bool = False


@dataclass
class Constraints:
    """Labels and the equations between them."""

    count: int = 1
    batches: list[Batch] = field(default_factory=list)
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    readers: dict[tuple[fx.Node, int], Ints] = field(default_factory=dict)
    absorbers: list[Ints] = field(default_factory=list)
    bounds: dict[fx.Node, Bounds] = field(default_factory=dict)
    #: Nodes that are watched, and their labels, at each size.
    watched: list[tuple[fx.Node, Ints]] = field(default_factory=list)
    _known: dict[tuple[fx.Node, str, int], Ints] = field(default_factory=dict)

    def copy(self) -> Constraints:
        """An independent copy."""
        return replace(
            self,
            batches=list(self.batches),
            sites=dict(self.sites),
            readers=dict(self.readers),
            absorbers=list(self.absorbers),
            bounds=dict(self.bounds),
            watched=list(self.watched),
            _known=dict(self._known),
        )

    def fresh(self, node: fx.Node, slot: str, count: int) -> Ints:
        """`count` labels for `node`; the same ones when asked again."""
        key = (node, slot, count)
        if key not in self._known:
            self._known[key] = np.arange(self.count, self.count + count)
            self.count += count
        return self._known[key]

    def demand(
        self,
        demand: Demand,
        *labels: Ints,
        factors: tuple[Floats | float, ...] = (),
        cause: Cause,
        soft: bool = False,
    ) -> None:
        """Add equations; `labels` have equal lengths."""
        if len(labels[0]):
            self.batches.append(Batch(demand, labels, factors, cause, soft))

    def ground(self, labels: Ints, cause: Cause) -> None:
        """Demand a = 1 and d = 0."""
        used = np.unique(labels)
        used = used[used > 0]
        self.demand(Demand.SAME, used, np.zeros_like(used), cause=cause)

    def site(self, site: Site) -> None:
        """Remember a site. Seen again, at other sizes, it must have the same gauges."""
        old = self.sites.setdefault(site.node, site)
        if old is site:
            return
        cause = Cause(site.node, "has other channels at another input size")
        for first, second in ((old.x, site.x), (old.y, site.y)):
            if len(first) == len(second):
                new = first != second
                self.demand(Demand.SAME, first[new], second[new], cause=cause)
            else:
                self.ground(first, cause)
                self.ground(second, cause)


@dataclass
class Systems:
    """The hard equations, solved, over classes of labels."""

    #: (labels,), class of every label, numbered from the ground's, 0.
    of: Ints
    #: log|a|.
    scale: LinearSystem
    #: 0 for a > 0, 1 for a < 0.
    sign: LinearSystem
    #: d.
    shift: LinearSystem

    def mark(self) -> tuple[int, int, int]:
        """A point to which `undo` can go back."""
        return self.scale.mark(), self.sign.mark(), self.shift.mark()

    def undo(self, mark: tuple[int, int, int]) -> None:
        """Forget all equations added since `mark`."""
        for system, at in zip((self.scale, self.sign, self.shift), mark, strict=True):
            system.undo(at)

    def copy(self) -> Systems:
        """An independent copy."""
        return Systems(self.of, self.scale.copy(), self.sign.copy(), self.shift.copy())


def hard_systems(found: Constraints, sites: Sequence[Site]) -> Systems:
    """All demands, in solved form. They are homogeneous, so they never contradict each other.

    Args:
        found: Labels and demands.
        sites: Calls that may vanish. What nothing ties to them keeps its values: it is ground.
    """
    same = [b.labels for b in found.batches if b.demand is Demand.SAME]
    of = classes(found.count, [(pair[0], pair[1]) for pair in same])
    tied = components(found, of, sites)
    ends = [np.append(site.x, site.y) for site in sites]
    of[~np.isin(tied, tied[np.concatenate([*ends, np.zeros(1, np.int64)])])] = 0
    of = np.unique(of, return_inverse=True)[1]
    count = int(of.max()) + 1
    slack = np.zeros(count, np.int64)
    for labels in found.absorbers:
        slack[of[labels]] = 1
    slack[0] = -1
    order = np.empty(count, np.int64)
    order[np.lexsort((np.arange(count), slack))] = np.arange(count)
    systems = Systems(of, LinearSystem(order), LinearSystem(order, 2), LinearSystem(order))
    ground = Rows.of((np.zeros(1, np.int64), 1.0))
    for system in (systems.scale, systems.sign, systems.shift):
        system.add(ground)
    for forms in (
        {Demand.SAME_SCALE, Demand.POSITIVE, Demand.UNSHIFTED},
        {Demand.SUM, Demand.GATE},
    ):
        hard = [batch for batch in found.batches if batch.demand in forms and not batch.soft]
        for system, rows in equations_of(hard, systems):
            system.add(rows)
    for system in (systems.scale, systems.sign, systems.shift):
        system.flatten()
    return systems


def equations_of(batches: list[Batch], systems: Systems) -> Iterator[tuple[LinearSystem, Rows]]:
    """The rows that demands other than SAME add to the systems."""
    of = systems.of
    gathered: dict[Demand, list[tuple[Ints, ...]]] = {}
    for batch in batches:
        count = len(batch.labels[0])
        parts = tuple(of[labels] for labels in batch.labels)
        factors = tuple(np.broadcast_to(factor, (count,)) for factor in batch.factors)
        gathered.setdefault(batch.demand, []).append((*parts, *factors))
    for demand, pieces in gathered.items():
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        columns = _distinct(columns)
        labels = [c.astype(np.int64) for c in columns]
        if demand is Demand.SAME_SCALE:
            rows = Rows.of((labels[0], 1.0), (labels[1], -1.0))
            yield from ((systems.scale, rows), (systems.sign, rows))
        elif demand is Demand.POSITIVE:
            yield systems.sign, Rows.of((labels[0], 1.0))
        elif demand is Demand.UNSHIFTED:
            yield systems.shift, Rows.of((labels[0], 1.0))
        elif demand is Demand.GATE:
            rows = Rows.of((labels[0], 1.0), (labels[1], -1.0), (labels[2], -columns[3]))
            yield from ((systems.scale, rows), (systems.sign, rows))
        else:
            terms = ((labels[0], 1.0), (labels[1], -columns[3]), (labels[2], -columns[4]))
            yield systems.shift, Rows.of(*terms)


def _distinct(columns: list[Any]) -> list[Any]:
    """The columns without the rows that occur before."""
    order = np.lexsort(columns)
    ordered = [column[order] for column in columns]
    new = np.ones(len(order), bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in ordered])
    return [column[new] for column in ordered]


def components(found: Constraints, of: Ints, sites: Iterable[Site]) -> Ints:
    """(labels,), a number that labels share which demands or `sites` tie together; ground is 0.

    A tie to the ground alone is none: it fixes a gauge and says nothing about others.

    Args:
        found: Labels and demands.
        of: (labels,), class of every label.
        sites: Calls whose input and output are tied.
    """
    ends = [(site.x, site.y) for site in sites]
    ends += [(batch.labels[0], other) for batch in found.batches for other in batch.labels[1:]]
    tied = [(of[a], of[b]) for a, b in ends]
    whole = classes(
        found.count, [(a[free], b[free]) for a, b in tied if (free := (a > 0) & (b > 0)).any()]
    )
    return whole[of]
