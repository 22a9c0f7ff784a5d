"""Why a BatchNorm stays, into which layers the others went, and whether more could have gone.

A site that contradicts the hard demands by itself stays under any choice. Other sites each force a
value on a gauge; two that force different values on one gauge cannot both go, so of a set of sites
that pairwise do so, all but one stay. Where that counts every site that stayed, the choice is
proved to be the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bnfx.constraints import Constraints, Demand, Kind, Site
from bnfx.gauges import ZERO, Gauges, Refused, attempt, equations
from bnfx.linear_system import Floats, Ints
from bnfx.rewriting import Pending
from bnfx.words import channels, describe, norm_path, path_of

#: Forced values closer than this, relatively, are not taken for a contradiction.
_APART = 1e-9
_VISITS = 5000
_HOPS = 4


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


class Explanation:
    """Answers about one solution."""

    def __init__(
        self,
        found: Constraints,
        gauges: Gauges,
        changes: Sequence[Pending],
        candidates: Sequence[Site],
    ) -> None:
        self.found = found
        self.hard = gauges.hard
        self.gauges = gauges
        self.changed = [change.site for change in changes]
        self.candidates = list(candidates)
        gone = {site.node for site in gauges.eliminated}
        self.gone = [site.node in gone for site in self.candidates]
        self._forced = {part: self._forces(part) for part in ("scale", "shift")}
        self._touching: tuple[Ints, Ints, Ints] | None = None
        of = gauges.systems.of
        self._of_changed = _by_class(of, self.changed)
        self._of_gone = _by_class(of, gauges.eliminated)

    # -- into ----------------------------------------------------------------------------------

    def into(self, site: Site) -> tuple[str, ...]:
        """Layers whose weights carry the site now: those next to it that were rewritten."""
        of = self.gauges.systems.of
        labels = np.unique(of[np.append(site.x, site.y)])
        eliminated = self.gauges.eliminated
        crossed = {i for i, s in enumerate(eliminated) if s is site}
        for _ in range(len(eliminated) + _HOPS):
            hit = _touched(self._of_changed, labels[labels > 0])
            if hit:
                return tuple(dict.fromkeys(owner(self.changed[i]) for i in sorted(hit)))
            new = sorted(_touched(self._of_gone, labels) - crossed)
            crossed.update(new)
            more = [eliminated[i] for i in new]
            ends = [of[np.append(b.x, b.y)] for b in more] or self._beside(labels)
            labels = np.unique(np.concatenate([labels, *ends]))
        return ()

    def _beside(self, labels: Ints) -> list[Ints]:
        """Labels that share an equation with some of `labels`, the ground left out."""
        of, found = self.gauges.systems.of, []
        for batch in self.found.batches:
            rows = [of[part] for part in batch.labels]
            hit = np.logical_or.reduce([np.isin(part, labels[labels > 0]) for part in rows])
            found += [part[hit] for part in rows]
        return found

    # -- reasons -------------------------------------------------------------------------------

    def reason(self, site: Site) -> str:
        """What keeps the site."""
        refused = self.gauges.refused[site.node]
        if refused.words:
            where = f" ({channels(refused.channels)})" if len(refused.channels) else ""
            return refused.words + where
        alone = attempt(self.hard, site, dead=True, keep=False)
        if alone is not None:
            return self._hard_reason(site, alone)
        rivals = self._rivals(site)
        where = channels(refused.channels)
        if rivals:
            shown = ", ".join(repr(_path(r)) for r in rivals[:4])
            more = f" and {len(rivals) - 4} more" if len(rivals) > 4 else ""
            return f"its {refused.part} on {where} conflicts with that of {shown}{more}"
        return f"its {refused.part} on {where} conflicts with other BatchNorms on the same tensors"

    def _hard_reason(self, site: Site, refused: Refused) -> str:
        of = self.hard.of
        lane = int(refused.channels[0])
        where = channels(refused.channels)
        if len(np.unique(of[site.x])) < len(site.x) and of[site.x[0]] > 0:
            return (
                f"it normalises axis 1, and its channels share one gauge in what it reads ({where})"
            )
        before = self._cause(int(site.x[lane]), refused.part)
        if not site.x[lane]:
            before = f"{describe(site.source)}, whose values stay"
        behind = self._cause(int(site.y[lane]), refused.part)
        if refused.part == "sign":
            return f"its scale is negative on {where}, which {behind or before} does not let pass"
        sides = [f"before it by {before}"] if before else []
        sides += [f"behind it by {behind}"] if behind else []
        return f"its {refused.part} on {where} is fixed " + " and ".join(sides)

    def _cause(self, label: int, part: str) -> str:
        """The nearest demand that fixes a gauge, in words."""
        if label == 0:
            return ""
        fixing = {
            "scale": {Demand.SAME, Demand.SAME_SCALE},
            "sign": {Demand.SAME, Demand.SAME_SCALE, Demand.POSITIVE},
            "shift": {Demand.SAME, Demand.UNSHIFTED},
        }[part]
        linking = {Demand.SAME, Demand.SUM} if part == "shift" else {Demand.SAME, Demand.SAME_SCALE}
        linking |= set() if part == "shift" else {Demand.GATE}
        seen, queue = {label}, [label]
        for current in queue:
            if len(seen) > _VISITS:
                break
            for index, row in self._at(current):
                batch = self.found.batches[index]
                ends = [int(labels[row]) for labels in batch.labels]
                if batch.demand in fixing and (len(ends) == 1 or 0 in ends):
                    return batch.cause.words
                if batch.demand in linking:
                    new = [end for end in ends if end and end not in seen]
                    seen.update(new)
                    queue.extend(new)
        return ""

    def _at(self, label: int) -> Iterator[tuple[int, int]]:
        """Batches and rows in which a label occurs."""
        if self._touching is None:
            rows = [
                (labels, np.full(len(labels), index), np.arange(len(labels)))
                for index, batch in enumerate(self.found.batches)
                for labels in batch.labels
            ]
            columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
            order = np.argsort(columns[0], kind="stable")
            self._touching = (columns[0][order], columns[1][order], columns[2][order])
        names, batches, places = self._touching
        low, high = np.searchsorted(names, [label, label + 1])
        yield from zip(batches[low:high].tolist(), places[low:high].tolist(), strict=True)

    # -- the best that the rules allow ---------------------------------------------------------

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

    def _rivals(self, site: Site) -> list[Site]:
        """Sites that went and force another value on a gauge that `site` forces."""
        index = next(i for i, s in enumerate(self.candidates) if s is site)
        found: set[int] = set()
        for forced in self._forced.values():
            mine = forced.site == index
            order = np.argsort(forced.gauge[mine], kind="stable")
            gauge, value = forced.gauge[mine][order], forced.value[mine][order]
            if not len(gauge):
                continue
            at = np.clip(np.searchsorted(gauge, forced.gauge), 0, len(gauge) - 1)
            same = gauge[at] == forced.gauge
            found.update(forced.site[same & _apart(value[at], forced.value)].tolist())
        return [self.candidates[i] for i in sorted(found) if self.gone[i]]

    def unavoidable(self) -> int:
        """A number of the candidates that stay under any choice that the rules allow."""
        stayed = [
            i
            for i, site in enumerate(self.candidates)
            if not self.gone[i] and site.kind is Kind.BATCH_NORM
        ]
        alone = {
            i
            for i in stayed
            if self.gauges.refused[self.candidates[i].node].words == ZERO
            or attempt(self.hard, self.candidates[i], dead=True, keep=False) is not None
        }
        return len(alone) + self._cliques(set(stayed) - alone)

    def _cliques(self, stayed: set[int]) -> int:
        """Counts sites that share a gauge with one that went, all forcing different values."""
        count, left = 0, set(stayed)
        for forced in self._forced.values():
            order = np.lexsort((forced.value, forced.gauge))
            gauge, value, site = forced.gauge[order], forced.value[order], forced.site[order]
            bounds = np.flatnonzero(np.diff(gauge)) + 1
            starts, ends = np.append(0, bounds), np.append(bounds, len(gauge))
            several = np.flatnonzero(ends - starts > 1)
            for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
                members, values = site[start:end], value[start:end]
                distinct = np.append(True, _apart(values[1:], values[:-1]))
                group = {int(m) for m in members[distinct]}
                if any(self.gone[m] for m in group) and len(hit := group & left):
                    count += len(hit)
                    left -= hit
        return count


def _by_class(of: Ints, sites: Sequence[Site]) -> dict[int, list[int]]:
    """Class of labels -> indices of the sites at which one of them ends."""
    found: dict[int, list[int]] = {}
    for index, site in enumerate(sites):
        for label in np.unique(of[np.append(site.x, site.y)]).tolist():
            found.setdefault(label, []).append(index)
    return found


def _touched(by_class: dict[int, list[int]], labels: Ints) -> set[int]:
    return {index for label in labels.tolist() for index in by_class.get(label, ())}


def _path(site: Site) -> str:
    return norm_path(site.node) if site.kind is Kind.BATCH_NORM else path_of(site.node)


def _apart(a: Floats, b: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    apart = np.abs(a - b) > _APART * np.maximum(np.abs(a), np.abs(b))
    return np.asarray(apart)


def owner(site: Site) -> str:
    """Path of the layer whose parameters a site reads."""
    weight = next((n for n in site.node.all_input_nodes if n.op == "get_attr"), None)
    if weight is None:
        return path_of(site.node)
    return str(weight.target).rpartition(".")[0] or str(weight.target)
