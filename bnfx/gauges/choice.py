"""Choose the gauges: which BatchNorms vanish, and what every scale and displacement is.

Hard demands come first, then full eliminations in topological order (`bnfx.gauges.elimination`),
then exchanges: one BatchNorm stays after all where two others can go instead. Choices that would
cost digits are refused (`bnfx.gauges.soundness`); what the equations leave free becomes the scale
that leaves most weights as they are, and d = 0.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from bnfx.gauges.bound import Bound
from bnfx.gauges.constraints import (
    LINEAR,
    Batch,
    Constraints,
    Kind,
    Site,
    Systems,
    components,
    equations_of,
    hard_systems,
)
from bnfx.gauges.elimination import NEEDED, Forward, Refused, absorber, attempt
from bnfx.gauges.linear_system import Rows
from bnfx.gauges.soundness import TOO_FAR, Soundness
from bnfx.numbers import Floats, Ints

_ROUNDS = 30
#: Scales closer than this, relatively, are the same.
_SAME = 1e-9


@dataclass(frozen=True)
class Gauges:
    """The solution."""

    #: (labels,), a.
    scale: Floats
    #: (labels,), d.
    shift: Floats
    #: Sites that vanish, in order.
    eliminated: tuple[Site, ...]
    #: Why the others stay.
    refused: dict[fx.Node, Refused]
    #: The equations that hold.
    systems: Systems
    #: What holds for every choice.
    bound: Bound

    def backward(self, site: Site) -> Ints:
        """Channels of an eliminated site whose constant the layer before it gives."""
        return np.flatnonzero((site.s == 0) & np.isfinite(self.scale[site.y]))

    def moves(self, labels: Ints) -> bool:
        """Whether values with these labels differ from what they were."""
        scaled = np.abs(self.scale[labels] - 1.0) > _SAME
        return bool(scaled.any() or (self.shift[labels] != 0).any())


@dataclass
class _Choice:
    """Sites eliminated so far, in the order in which their equations were added."""

    #: The equations that hold.
    systems: Systems
    #: Each eliminated site's node -> the point in `systems` before it.
    gone: dict[fx.Node, tuple[int, int, int]] = field(default_factory=dict)
    #: The eliminated sites.
    sites: list[Site] = field(default_factory=list)
    #: Why others were not.
    refused: dict[fx.Node, Refused] = field(default_factory=dict)

    def back_to(self, count: int) -> None:
        """Take back all but the first `count` eliminations."""
        if count < len(self.sites):
            self.systems.undo(self.gone[self.sites[count].node])
        for site in self.sites[count:]:
            del self.gone[site.node]
        del self.sites[count:]

    def norms(self) -> int:
        """How many BatchNorms vanish."""
        return sum(site.kind is Kind.BATCH_NORM for site in self.sites)


class Solver:
    """Decides for candidates in their order of preference.

    Args:
        found: Labels and demands.
        candidates: Sites that may vanish, BatchNorms first.
        fixed: Nodes whose values must stay.
        limit: Largest |log a|.
    """

    def __init__(
        self, found: Constraints, candidates: list[Site], fixed: frozenset[fx.Node], limit: float
    ) -> None:
        self.found = found
        self.candidates = candidates
        self.fixed = fixed
        self.hard = hard_systems(found, candidates)
        self.sound = Soundness(found, self.hard.of, candidates, limit)
        self.bound = Bound(self.hard, candidates)
        self.forward = Forward(found)
        self._soft: dict[fx.Node, list[Batch]] = {}
        for batch in found.batches:
            if batch.soft:
                self._soft.setdefault(batch.cause.node, []).append(batch)

    def solve(self) -> Gauges:
        """The gauges; what would cost digits is refused, the rest redone without it."""
        ill: dict[fx.Node, Refused] = {}
        for _ in range(_ROUNDS):
            choice = self._chosen(ill)
            mark = choice.systems.mark()
            scale, shift = self._filled(choice.systems)
            bad = self.sound.ill(choice.systems, choice.sites, scale, shift)
            if not bad and not ill:
                return self._gauges(choice, scale, shift)
            choice.systems.undo(mark)
            if not bad:
                break
            ill |= bad
        else:
            words = "no numerically sound gauge was found"
            ill = {s.node: Refused("", np.zeros(0, np.int64), words) for s in self.candidates}
            choice = _Choice(self.hard.copy(), refused=dict(ill))
        self._tried_again(choice, ill)
        return self._gauges(choice, *self._filled(choice.systems))

    def _gauges(self, choice: _Choice, scale: Floats, shift: Floats) -> Gauges:
        place = {node: at for at, node in enumerate(self.found.sites)}
        eliminated = sorted(choice.sites, key=lambda site: place[site.node])
        forward = [site for site in eliminated if self.forward.takes(site)]
        for site in forward:  # W / inf = 0, and b - W (-t)
            zero = site.s == 0
            scale[site.y[zero]], shift[site.y[zero]] = np.inf, -site.t[zero]
        return Gauges(scale, shift, tuple(eliminated), choice.refused, choice.systems, self.bound)

    # -- which -----------------------------------------------------------------------------------

    def _chosen(self, ill: Mapping[fx.Node, Refused]) -> _Choice:
        choice = _Choice(self.hard.copy(), refused=dict(ill))
        willing = [site for site in self.candidates if site.node not in ill]
        norms = [site for site in willing if site.kind is Kind.BATCH_NORM]
        self._add(choice, norms)
        self._exchange(choice, norms)
        self._add(choice, [site for site in willing if site.node not in choice.gone])
        return choice

    def _add(self, choice: _Choice, sites: Iterable[Site]) -> None:
        """Eliminate what can be, again until nothing changes: one that went may free others."""
        waiting = [site for site in sites if site.node not in choice.gone]
        while waiting:
            done = [site for site in waiting if self._try(choice, site)]
            if not done:
                return
            # a contradiction stays one, whatever comes after it
            waiting = [
                site
                for site in waiting
                if site.node in choice.refused and choice.refused[site.node].words
            ]

    def _try(self, choice: _Choice, site: Site) -> bool:
        systems, mark = choice.systems, choice.systems.mark()
        dead = not site.s.all() and (
            self.forward.takes(site) or self._constant_fits(site, choice.gone)
        )
        refusal = attempt(systems, site, dead=dead)
        if refusal is None:
            far = self.sound.settled_too_far(systems, [site])
            if far.any():
                systems.undo(mark)
                refusal = Refused("", np.flatnonzero(far), TOO_FAR)
            elif self._needed(choice, site):
                systems.undo(mark)
                refusal = Refused("", np.zeros(0, np.int64), NEEDED)
        if refusal is not None:
            choice.refused[site.node] = refusal
            return False
        choice.refused.pop(site.node, None)
        choice.gone[site.node] = mark
        choice.sites.append(site)
        return True

    def _needed(self, choice: _Choice, site: Site) -> bool:
        """Whether one that is gone has its constant in `site`, and no other place for it."""
        zeros = [z for z in choice.sites if not z.s.all() and not self.forward.takes(z)]
        gone = {*choice.gone, site.node}
        return not all(self._constant_fits(zero, gone) for zero in zeros)

    def _constant_fits(self, site: Site, gone: Collection[fx.Node]) -> bool:
        """Whether the layer before `site` may give a constant where s = 0."""
        layer = absorber(self.found, site, gone)
        return layer is not None and layer.node not in self.fixed

    def _exchange(self, choice: _Choice, norms: Sequence[Site]) -> None:
        """Keep one BatchNorm where at least two others can go instead, until there is none."""
        while self._exchanged(choice, norms):
            pass

    def _exchanged(self, choice: _Choice, norms: Sequence[Site]) -> bool:
        stayed = [
            (site, choice.refused[site.node]) for site in norms if site.node in choice.refused
        ]
        if len(stayed) <= self.bound.unavoidable(stayed):
            return False
        hopeful = [site for site, why in stayed if self.bound.alone(site) is None]
        best, order, whole = choice.norms(), list(choice.sites), len(choice.sites)
        for at in range(len(order) - 1, -1, -1):
            rivals = self._beside(order[at], hopeful)
            if len(rivals) < 2:
                continue
            whole = at
            choice.back_to(at)
            self._add(choice, [*order[at + 1 :], *rivals, order[at]])
            if choice.norms() > best:
                self._add(choice, norms)
                return True
        choice.back_to(whole)
        self._add(choice, order[whole:])
        return False

    @functools.cached_property
    def _tied(self) -> Ints:
        return components(self.found, self.hard.of, self.candidates)

    def _beside(self, site: Site, others: Sequence[Site]) -> list[Site]:
        """Those of `others` whose gauges are tied to those of `site`, however indirectly."""
        tied = self._tied
        mine = np.unique(tied[np.append(site.x, site.y)])
        mine = mine[mine > 0]
        return [other for other in others if np.isin(tied[np.append(other.x, other.y)], mine).any()]

    # -- soundly ---------------------------------------------------------------------------------

    def _filled(self, systems: Systems) -> tuple[Floats, Floats]:
        """All scales and displacements, with the soft demands added to `systems`."""
        self._soften(systems)
        return values(self.found, systems, self.sound.limit)

    def _costs(self, choice: _Choice) -> bool:
        """Whether the choice costs digits."""
        mark = choice.systems.mark()
        bad = self.sound.ill(choice.systems, choice.sites, *self._filled(choice.systems))
        choice.systems.undo(mark)
        return bool(bad)

    def _tried_again(self, choice: _Choice, ill: Mapping[fx.Node, Refused]) -> None:
        """Eliminate what was refused with others that are not eliminated now, one by one."""
        for site in self.candidates:
            if site.node not in ill:
                continue
            count = len(choice.sites)
            if self._try(choice, site) and self._costs(choice):
                choice.back_to(count)
            if site.node not in choice.gone:
                choice.refused[site.node] = ill[site.node]

    def _soften(self, systems: Systems) -> None:
        """Soft demands, node by node, where they contradict nothing and cost no digits."""
        for batches in self._soft.values():
            mark = systems.mark()
            wrong = any(len(s.add(rows)) for s, rows in equations_of(batches, systems))
            shifted = systems.shift.mark() != mark[2]
            if wrong or (shifted and self.sound.settled_too_far(systems).any()):
                systems.undo(mark)
        if self._soft:  # what is free yet stays where several read it
            several = np.flatnonzero(self.sound.several & (np.arange(len(systems.of)) > 0))
            systems.shift.add(Rows.of((np.unique(systems.of[several]), 1.0)))


def values(found: Constraints, systems: Systems, limit: float) -> tuple[Floats, Floats]:
    """(labels,) a and (labels,) d.

    Args:
        found: Labels and sites.
        systems: The equations that hold.
        limit: Largest |log a| that is sought.
    """
    of = systems.of
    which = np.arange(len(systems.scale.order))
    expanded = systems.scale.substituted(Rows.of((which, 1.0)))
    free = _anchored(found, systems, which, expanded, limit)
    terms = np.where(expanded.unknowns < 0, 0.0, free[expanded.unknowns])
    logs = (terms * expanded.coefficients).sum(axis=1) + expanded.constant
    signs = systems.sign.substituted(Rows.of((which, 1.0))).constant
    shifts = systems.shift.substituted(Rows.of((which, 1.0))).constant
    logs[np.abs(logs) < 1e-14] = 0.0
    with np.errstate(over="ignore"):  # a scale beyond every number is refused for its size
        scale = np.exp(logs) * np.where(signs % 2 == 1, -1.0, 1.0)
    return scale[of], shifts[of]


def _anchored(
    found: Constraints, systems: Systems, which: Ints, expanded: Rows, limit: float
) -> Floats:
    """Values of the free scales: those that leave most weights as they are."""
    free = np.zeros(len(which))
    single = (expanded.unknowns >= 0).sum(axis=1) == 1
    single &= expanded.coefficients[:, 0] == 1.0
    if not single.any():
        return free
    weight = np.zeros(len(which))
    for site in found.sites.values():
        if site.kind in (*LINEAR, Kind.NORM):
            np.add.at(weight, systems.of[np.concatenate([site.x, site.y])], 1.0)
    label, root = which[single], expanded.unknowns[single, 0]
    offset = expanded.constant[single]
    order = np.lexsort((offset, root))
    label, root, offset = label[order], root[order], offset[order]
    new = np.ones(len(label), bool)
    new[1:] = (root[1:] != root[:-1]) | (np.diff(offset) > _SAME)
    group = np.cumsum(new) - 1
    votes = np.bincount(group, weight[label])
    latest = np.zeros(len(votes), np.int64)
    np.maximum.at(latest, group, label)
    heads = np.flatnonzero(new)
    ranked = np.lexsort((latest, votes, root[heads]))
    last = np.append(root[heads][ranked][1:] != root[heads][ranked][:-1], True)
    best = ranked[last]
    free[root[heads][best]] = -offset[heads][best]
    _centre(free, root, offset, limit)
    return free


def _centre(free: Floats, root: Ints, offset: Floats, limit: float) -> None:
    """Where that leaves the range, the middle of the range."""
    low = np.full(len(free), np.inf)
    high = np.full(len(free), -np.inf)
    np.minimum.at(low, root, offset)
    np.maximum.at(high, root, offset)
    used = np.unique(root)
    reach = np.maximum(np.abs(low[used] + free[used]), np.abs(high[used] + free[used]))
    far = used[reach > limit]
    free[far] = -(low[far] + high[far]) / 2
