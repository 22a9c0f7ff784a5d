"""How many BatchNorms stay whatever is chosen, and which contradict each other.

A site that contradicts the hard demands by itself stays under any choice. Other sites each force a
value on a gauge; two that force different values on one gauge cannot both go, so of a set of sites
that pairwise do so, all but one stay. Where that counts every site that stayed, the choice is
proved to be the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfx.constraints import Kind, Site, Systems
from bnfx.elimination import ZERO, Refused, attempt, equations
from bnfx.linear_system import Flags, Floats, Ints

#: Forced values closer than this, relatively, are not taken for a contradiction.
_APART = 1e-9


@dataclass(frozen=True)
class Forced:
    """Values that sites force on free gauges of one part; one row for each channel.

    Attributes:
        gauge: The unknown.
        value: What it must be.
        site: Index among the candidates.
    """

    gauge: Ints
    value: Floats
    site: Ints


class Bound:
    """What holds for every choice among `candidates`, given the hard demands alone."""

    def __init__(self, hard: Systems, candidates: Sequence[Site]) -> None:
        self.hard = hard
        self.candidates = list(candidates)
        self.place = {site.node: index for index, site in enumerate(self.candidates)}
        self._forced = tuple(self._forces(part) for part in ("scale", "shift"))
        self._alone: dict[int, Refused | None] = {}

    def alone(self, site: Site) -> Refused | None:
        """Why the site stays under any choice; None where it might go."""
        index = self.place[site.node]
        if index not in self._alone:
            self._alone[index] = attempt(self.hard, site, dead=True, keep=False)
        return self._alone[index]

    def rivals(self, site: Site) -> list[Site]:
        """Sites that force another value on a gauge that `site` forces."""
        index, found = self.place[site.node], set[int]()
        for forced in self._forced:
            mine = forced.site == index
            order = np.argsort(forced.gauge[mine], kind="stable")
            gauge, value = forced.gauge[mine][order], forced.value[mine][order]
            if not len(gauge):
                continue
            at = np.clip(np.searchsorted(gauge, forced.gauge), 0, len(gauge) - 1)
            same = gauge[at] == forced.gauge
            found.update(forced.site[same & _apart(value[at], forced.value)].tolist())
        return [self.candidates[i] for i in sorted(found)]

    def unavoidable(self, stayed: Sequence[tuple[Site, Refused]]) -> int:
        """A number of the BatchNorms in `stayed` that no choice under the rules can remove.

        Args:
            stayed: All candidates that were not eliminated, and why.
        """
        norms = [(site, why) for site, why in stayed if site.kind is Kind.BATCH_NORM]
        alone = {
            self.place[site.node]
            for site, why in norms
            if why.words == ZERO or self.alone(site) is not None
        }
        left = {self.place[site.node] for site, _ in norms} - alone
        kinds = [site.kind is Kind.BATCH_NORM for site in self.candidates]
        others = set(np.flatnonzero(kinds).tolist()) - {self.place[site.node] for site, _ in stayed}
        return len(alone) + self._cliques(left, left | others)

    def _forces(self, part: str) -> Forced:
        gauges, values, sites = [], [], []
        for index, site in enumerate(self.candidates):
            system, rows = equations(self.hard, site)[part]
            rows = system.substituted(rows)
            single = (rows.unknowns >= 0).sum(axis=1) == 1
            gauges.append(rows.unknowns[single, 0])
            values.append(-rows.constant[single] / rows.coefficients[single, 0])
            sites.append(np.full(int(single.sum()), index))
        if not gauges:
            return Forced(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
        return Forced(np.concatenate(gauges), np.concatenate(values), np.concatenate(sites))

    def _cliques(self, left: set[int], free: set[int]) -> int:
        """Of disjoint sets of sites that pairwise contradict, all but one each stay."""
        groups: set[frozenset[int]] = set()
        for forced in self._forced if left else ():
            order = np.lexsort((forced.value, forced.gauge))
            gauge, value, site = forced.gauge[order], forced.value[order], forced.site[order]
            bounds = np.flatnonzero(np.diff(gauge)) + 1
            starts, ends = np.append(0, bounds), np.append(bounds, len(gauge))
            several = np.flatnonzero(ends - starts > 1)
            for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
                members, values = site[start:end], value[start:end]
                distinct = np.append(True, _apart(values[1:], values[:-1]))
                groups.add(frozenset(members[distinct].tolist()))
        count = 0
        for group in sorted(groups, key=lambda group: (-len(group), min(group))):
            if (group & left) and len(clique := group & free) > 1:
                count += len(clique) - 1
                free = free - clique
        return count


def _apart(a: Floats, b: Floats) -> Flags:
    return np.asarray(np.abs(a - b) > _APART * np.maximum(np.abs(a), np.abs(b)))
