"""Choose the gauges: which BatchNorms vanish, and what every scale and displacement is.

A site y = s x + t is eliminated iff, for each channel,

    a_x = s a_y        and        d_y = s d_x - t.

Hard demands come first, then full eliminations in topological order. What is left free becomes
the gauge that leaves most weights as they are, and d = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import fx

from bnfx.constraints import Batch, Constraints, Kind, Site, Systems, equations_of, hard_systems
from bnfx.evaluation import readers
from bnfx.linear_system import Flags, Floats, Ints, LinearSystem, Rows

#: |log a| that a stored weight may gain without leaving the range of its dtype.
WIDE, NARROW = float(np.log(1e6)), float(np.log(2.0**8))

#: Displacements are refused that move a tensor with several readers further than this, in its
#: own standard deviations: the readers would subtract what was added, and lose digits.
_MAX_SHIFT = 8.0
_ROUNDS = 30
_TOO_FAR = (
    f"its shift would move a tensor with several readers by more than {_MAX_SHIFT:g} standard "
    "deviations, which costs digits"
)
_SAME = 1e-9
ZERO = "its scale is zero, and what it reads is not the output of a layer that it alone reads"


@dataclass(frozen=True)
class Refused:
    """Why a site stays.

    Attributes:
        part: "scale", "sign", "shift", or "" for a reason of its own.
        channels: Channels on which its equation contradicts the others.
        words: The reason, where it is one of its own.
    """

    part: str
    channels: Ints
    words: str = ""


@dataclass(frozen=True)
class Gauges:
    """The solution.

    Attributes:
        scale: (labels,), a.
        shift: (labels,), d.
        eliminated: Sites that vanish, in order.
        refused: Why the others stay.
        systems: The equations that hold.
        hard: Those that hold whatever is eliminated.
    """

    scale: Floats
    shift: Floats
    eliminated: tuple[Site, ...]
    refused: dict[fx.Node, Refused]
    systems: Systems
    hard: Systems


@dataclass
class Solver:
    """Decides for `candidates`, in their order of preference.

    Attributes:
        found: Labels and demands.
        candidates: Sites that may vanish.
        fixed: Nodes whose values must stay.
        limit: Largest |log a|.
    """

    found: Constraints
    candidates: list[Site]
    fixed: frozenset[fx.Node]
    limit: float
    refused: dict[fx.Node, Refused] = field(default_factory=dict)
    _readers: Flags | None = None

    def solve(self) -> Gauges:
        """The gauges; sites whose elimination would cost digits are refused and the rest redone."""
        hard = hard_systems(self.found)
        ill: dict[fx.Node, Refused] = {}
        for _ in range(_ROUNDS):
            systems = hard.copy()
            self.refused = dict(ill)
            chosen = self._greedy(systems, ill)
            self._soften(systems)
            scale, shift = self._values(systems)
            bad = self._ill(systems, chosen, scale, shift)
            if not bad:
                break
            ill |= bad
        else:
            systems, chosen = hard.copy(), []
            scale, shift = self._values(systems)
            words = "no numerically sound gauge was found"
            self.refused = {s.node: Refused("", np.zeros(0, int), words) for s in self.candidates}
        return Gauges(scale, shift, tuple(chosen), self.refused, systems, hard)

    def _greedy(self, systems: Systems, ill: dict[fx.Node, Refused]) -> list[Site]:
        chosen: list[Site] = []
        gone: set[fx.Node] = set()
        again = [site for site in self.candidates if not site.s.all()]
        for site in (*self.candidates, *again):  # a constant that went may clear the way
            if site.node not in ill and site.node not in gone and self._try(systems, site, gone):
                chosen.append(site)
                gone.add(site.node)
                self.refused.pop(site.node, None)
        place = {node: at for at, node in enumerate(self.found.sites)}
        return sorted(chosen, key=lambda site: place[site.node])

    def _soften(self, systems: Systems) -> None:
        """Soft demands, node by node, where they contradict nothing and cost no digits."""
        by_node: dict[fx.Node, list[Batch]] = {}
        for batch in self.found.batches:
            if batch.soft:
                by_node.setdefault(batch.cause.node, []).append(batch)
        norms = [site for site in self.found.sites.values() if len(site.mean)]
        for batches in by_node.values():
            mark = systems.mark()
            wrong = any(len(s.add(rows)) for s, rows in equations_of(batches, systems))
            if wrong or self._any_far(systems, norms):
                systems.undo(mark)
        if by_node:  # what is free yet stays where several read it
            several = np.flatnonzero(self._several(systems) & (np.arange(len(systems.of)) > 0))
            systems.shift.add(Rows.of((np.unique(systems.of[several]), 1.0)))

    def _any_far(self, systems: Systems, norms: list[Site]) -> bool:
        if not norms:
            return False
        labels = systems.of[np.concatenate([site.x for site in norms])]
        known = systems.shift.substituted(Rows.of((labels, 1.0)))
        shift = np.where((known.unknowns < 0).all(axis=1), known.constant, 0.0)
        ends = np.cumsum([len(site.x) for site in norms])[:-1]
        parts = np.split(shift, ends)
        return any(
            bool(self._far(systems, site, part).any())
            for site, part in zip(norms, parts, strict=True)
        )

    def _try(self, systems: Systems, site: Site, gone: set[fx.Node]) -> bool:
        mark = systems.mark()
        before = absorber(self.found, site, gone) if not site.s.all() else None
        refusal = attempt(systems, site, dead=before is not None and before.node not in self.fixed)
        if refusal is None and len(site.mean):
            known = systems.shift.substituted(Rows.of((systems.of[site.x], 1.0)))
            shift = np.where((known.unknowns < 0).all(axis=1), known.constant, 0.0)
            far = self._far(systems, site, shift)
            if far.any():
                systems.undo(mark)
                refusal = Refused("", np.flatnonzero(far), _TOO_FAR)
        if refusal is not None:
            self.refused[site.node] = refusal
        return refusal is None

    def _values(self, systems: Systems) -> tuple[Floats, Floats]:
        of = systems.of
        which = np.unique(of)
        logs = np.zeros(len(of))
        expanded = systems.scale.substituted(Rows.of((which, 1.0)))
        free = self._anchored(systems, which, expanded)
        terms = np.where(expanded.unknowns < 0, 0.0, free[expanded.unknowns])
        logs[which] = (terms * expanded.coefficients).sum(axis=1) + expanded.constant
        signs = np.zeros(len(of))
        signs[which] = systems.sign.substituted(Rows.of((which, 1.0))).constant
        shifts = np.zeros(len(of))
        shifts[which] = systems.shift.substituted(Rows.of((which, 1.0))).constant
        logs[np.abs(logs) < 1e-14] = 0.0
        scale = np.exp(logs) * np.where(signs % 2 == 1, -1.0, 1.0)
        return scale[of], shifts[of]

    def _anchored(self, systems: Systems, which: Ints, expanded: Rows) -> Floats:
        """Values of the free scales: those that leave most weights as they are."""
        free = np.zeros(len(systems.of))
        single = (expanded.unknowns >= 0).sum(axis=1) == 1
        single &= expanded.coefficients[:, 0] == 1.0
        if not single.any():
            return free
        weight = np.zeros(len(systems.of))
        for site in self.found.sites.values():
            if site.kind in (Kind.AFFINE, Kind.NORM):
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
        self._centre(free, root, offset)
        return free

    def _centre(self, free: Floats, root: Ints, offset: Floats) -> None:
        """Where that leaves the range, the middle of the range."""
        low = np.full(len(free), np.inf)
        high = np.full(len(free), -np.inf)
        np.minimum.at(low, root, offset)
        np.maximum.at(high, root, offset)
        used = np.unique(root)
        reach = np.maximum(np.abs(low[used] + free[used]), np.abs(high[used] + free[used]))
        far = used[reach > self.limit]
        free[far] = -(low[far] + high[far]) / 2

    # -- numerical soundness -------------------------------------------------------------------

    def _ill(
        self, systems: Systems, chosen: list[Site], scale: Floats, shift: Floats
    ) -> dict[fx.Node, Refused]:
        bad = self._displaced(systems, chosen, shift)
        return bad or self._stretched(systems, chosen, scale)

    def _several(self, systems: Systems) -> Flags:
        """(labels,): whether more than one call reads the gauge."""
        if self._readers is None:
            counts = np.zeros(len(systems.of), np.int64)
            for labels in self.found.readers.values():
                np.add.at(counts, np.unique(systems.of[labels]), 1)
            self._readers = counts[systems.of] > 1
        return self._readers

    def _far(self, systems: Systems, site: Site, shift: Floats) -> Flags:
        """(channels,): whether `shift` moves the input of a norm too far for its other readers."""
        with np.errstate(all="ignore"):
            moved = np.abs(site.mean + shift)
            far = moved > np.maximum(_MAX_SHIFT * site.std, np.abs(site.mean) * 1.5)
        far = far & self._several(systems)[site.x] & (shift != 0)
        return np.asarray(far)

    def _displaced(
        self, systems: Systems, chosen: list[Site], shift: Floats
    ) -> dict[fx.Node, Refused]:
        eliminated = {site.node for site in chosen}
        bad: dict[fx.Node, Refused] = {}
        for site in self.found.sites.values():
            if not len(site.mean):
                continue
            far = self._far(systems, site, shift[site.x])
            if not far.any():
                continue
            culprits = [site] if site.node in eliminated else _sharing(chosen, site.x[far])
            for culprit in culprits or chosen:
                bad[culprit.node] = Refused("", np.flatnonzero(far), _TOO_FAR)
        return bad

    def _stretched(
        self,
        systems: Systems,
        chosen: list[Site],
        scale: Floats,
    ) -> dict[fx.Node, Refused]:
        several = self._several(systems)
        logs = np.abs(np.log(np.abs(scale)))
        private = np.zeros(len(scale), bool)
        for site in chosen:  # a layer's own output, which nothing but this site reads
            if site.node.args and site.kind is Kind.BATCH_NORM:
                private[site.x[~several[site.x]]] = True
        far = (logs > self.limit) & ~private
        if not far.any():
            return {}
        roots = set(systems.of[np.flatnonzero(far)].tolist())
        touching = [s for s in chosen if roots & set(systems.of[np.append(s.x, s.y)].tolist())]
        worst = max(touching or chosen, key=_stretch, default=None)
        if worst is None:
            return {}
        words = (
            f"its scale would take weights beyond {np.exp(self.limit):.3g} times their size or "
            "below its inverse, together with others on the same tensor"
        )
        return {worst.node: Refused("", np.zeros(0, np.int64), words)}


def _stretch(site: Site) -> float:
    used = np.abs(site.s[site.s != 0])
    return float(np.abs(np.log(used)).max(initial=0.0))


def _sharing(chosen: list[Site], labels: Ints) -> list[Site]:
    return [s for s in chosen if np.isin(s.x, labels).any() or np.isin(s.y, labels).any()]


def absorber(found: Constraints, site: Site, gone: set[fx.Node]) -> Site | None:
    """The layer or kept BatchNorm that alone feeds `site`, through BatchNorms that are gone.

    Where s = 0 it may give the constant t instead of its own channel.
    """
    current = site
    while current.source is not None and len(readers(current.source)) == 1:
        before = found.sites.get(current.source)
        if before is None or not np.array_equal(before.y, current.x):
            return None
        if current.source not in gone:
            return None if before.kind in (Kind.SCALE, Kind.SHIFT) else before
        current = before
    return None


def equations(systems: Systems, site: Site) -> dict[str, tuple[LinearSystem, Rows]]:
    """The equations of an elimination by part, for the channels with s != 0."""
    live = site.s != 0
    x, y = systems.of[site.x[live]], systems.of[site.y[live]]
    s, t = site.s[live], site.t[live]
    logs, negative = np.log(np.abs(s)), (s < 0).astype(float)
    return {
        "scale": (systems.scale, Rows.of((x, 1.0), (y, -1.0), constant=-logs, floor=1.0)),
        "sign": (systems.sign, Rows.of((x, 1.0), (y, 1.0), constant=negative)),
        "shift": (systems.shift, Rows.of((y, 1.0), (x, -s), constant=t)),
    }


def attempt(systems: Systems, site: Site, *, dead: bool, keep: bool = True) -> Refused | None:
    """Add the equations of an elimination; where they contradict, nothing changes.

    Args:
        systems: What holds so far.
        site: The site to eliminate.
        dead: Whether its input may become constant on channels with s = 0.
        keep: Whether the equations stay where they do not contradict.
    """
    lanes = np.flatnonzero(site.s != 0)
    if len(lanes) < len(site.s) and not dead:
        return Refused("", np.flatnonzero(site.s == 0), ZERO)
    mark = systems.mark()
    for name, (system, rows) in equations(systems, site).items():
        wrong = system.add(rows)
        if len(wrong):
            systems.undo(mark)
            return Refused(name, lanes[wrong])
    if not keep:
        systems.undo(mark)
    return None
