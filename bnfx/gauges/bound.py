"""How many BatchNorms stay whatever is chosen, and which contradict each other.

A site that contradicts the hard demands by itself stays under any choice. Other sites each force a
value or sign on a gauge; two that force different ones on one gauge cannot both go, so of a set of
sites that pairwise do so, all but one stay. Where that counts every site that stayed, the choice is
proved to be the best.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfx.gauges.constraints import Kind, Site, Systems
from bnfx.gauges.elimination import ZERO, Refused, attempt, equations
from bnfx.gauges.linear_system import Flags
from bnfx.numbers import Floats, Ints

#: Forced values closer than this, relatively, are not taken for a contradiction.
_APART = 1e-9


@dataclass(frozen=True)
class Forced:
    """Values that sites force on free gauges of one part; one row for each channel."""

    #: The unknown.
    gauge: Ints
    #: What it must be.
    value: Floats
    #: Index among the candidates.
    site: Ints


class Bound:
    """What holds for every choice among `candidates`, given the hard demands alone."""

    def __init__(self, hard: Systems, candidates: Sequence[Site]) -> None:
        self.hard = hard
        self.candidates = list(candidates)
        self.place = {site.node: index for index, site in enumerate(self.candidates)}
        self._forced = tuple(self._forces(part) for part in ("scale", "shift", "sign"))
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
            value = -rows.constant[single] / rows.coefficients[single, 0]
            gauges.append(rows.unknowns[single, 0])
            values.append(value % system.modulus if system.modulus else value)
            sites.append(np.full(int(single.sum()), index))
        if not gauges:
            return Forced(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
        return Forced(np.concatenate(gauges), np.concatenate(values), np.concatenate(sites))

    def _cliques(self, left: set[int], free: set[int]) -> int:
        """Of disjoint sets of sites that pairwise contradict, all but one each stay."""
        if not left:
            return 0
        open_to = np.zeros(len(self.candidates), bool)
        open_to[list(free)] = True
        count, against = 0, self._contradictions
        while True:
            degrees = (against & open_to).sum(axis=1) * open_to
            first = int(degrees.argmax())
            if not degrees[first]:
                return count
            clique, others = [first], against[first] & open_to
            while others.any():
                degrees = (against & others).sum(axis=1) * others
                chosen = int(np.where(others, degrees + 1, 0).argmax())
                clique.append(chosen)
                others &= against[chosen]
            count += len(clique) - 1
            open_to[clique] = False

    @functools.cached_property
    def _contradictions(self) -> Flags:
        """(candidates, candidates), whether two force different values on one gauge."""
        against = np.zeros((len(self.candidates),) * 2, bool)
        for forced in self._forced:
            order = np.lexsort((forced.value, forced.gauge))
            gauge, value, site = forced.gauge[order], forced.value[order], forced.site[order]
            bounds = np.flatnonzero(np.diff(gauge)) + 1
            starts, ends = np.append(0, bounds), np.append(bounds, len(gauge))
            several = np.flatnonzero(ends - starts > 1)
            for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
                steps = _apart(value[start + 1 : end], value[start : end - 1])
                level = np.append(0, np.cumsum(steps))
                members = site[start:end]
                against[np.ix_(members, members)] |= level[:, None] != level
        return against


def _apart(a: Floats, b: Floats) -> Flags:
    return np.asarray(np.abs(a - b) > _APART * np.maximum(np.abs(a), np.abs(b)))
