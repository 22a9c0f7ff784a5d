"""Why a BatchNorm stays, and into which layers the others went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bnfx.constraints import Constraints, Demand, Kind, Site
from bnfx.elimination import Refused
from bnfx.gauges import Gauges
from bnfx.linear_system import Ints
from bnfx.rewriting import Pending
from bnfx.words import channels, describe, norm_path, path_of

_VISITS = 5000
_HOPS = 4


class Explanation:
    """Answers about one solution."""

    def __init__(
        self,
        found: Constraints,
        gauges: Gauges,
        changes: Sequence[Pending],
    ) -> None:
        self.found = found
        self.gauges = gauges
        self.bound = gauges.bound
        self.gone = {site.node for site in gauges.eliminated}
        self.changed = [change.site for change in changes]
        self._touching: tuple[Ints, Ints, Ints] | None = None
        of = gauges.systems.of
        self._of_changed = _Ends(of, self.changed)
        self._of_gone = _Ends(of, gauges.eliminated)

    # -- into ----------------------------------------------------------------------------------

    def into(self, site: Site) -> tuple[str, ...]:
        """Layers whose weights carry the site now: those next to it that were rewritten."""
        of = self.gauges.systems.of
        labels = np.unique(of[np.append(site.x, site.y)])
        eliminated = self.gauges.eliminated
        crossed = {i for i, s in enumerate(eliminated) if s is site}
        for _ in range(len(eliminated) + _HOPS):
            hit = self._of_changed.at(labels[labels > 0])
            if hit:
                return tuple(dict.fromkeys(owner(self.changed[i]) for i in sorted(hit)))
            new = sorted(self._of_gone.at(labels) - crossed)
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
        alone = self.bound.alone(site)
        if alone is not None:
            return self._hard_reason(site, alone)
        rivals = [rival for rival in self.bound.rivals(site) if rival.node in self.gone]
        where = channels(refused.channels)
        if rivals:
            shown = ", ".join(repr(_path(r)) for r in rivals[:4])
            more = f" and {len(rivals) - 4} more" if len(rivals) > 4 else ""
            return f"its {refused.part} on {where} conflicts with that of {shown}{more}"
        return f"its {refused.part} on {where} conflicts with other BatchNorms on the same tensors"

    def _hard_reason(self, site: Site, refused: Refused) -> str:
        of = self.bound.hard.of
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


class _Ends:
    """At which of `sites` a class of labels ends, one of its inputs or outputs."""

    def __init__(self, of: Ints, sites: Sequence[Site]) -> None:
        ends = [np.unique(of[np.append(site.x, site.y)]) for site in sites]
        names = np.concatenate([*ends, np.zeros(0, np.int64)])
        order = np.argsort(names, kind="stable")
        self._names = names[order]
        self._sites = np.repeat(np.arange(len(ends)), [len(e) for e in ends])[order]

    def at(self, labels: Ints) -> set[int]:
        """Indices of the sites that have one of `labels`."""
        low = np.searchsorted(self._names, labels, "left")
        counts = np.searchsorted(self._names, labels, "right") - low
        starts = np.repeat(low - np.cumsum(counts) + counts, counts)
        return set(self._sites[starts + np.arange(len(starts))].tolist())


def _path(site: Site) -> str:
    return norm_path(site.node) if site.kind is Kind.BATCH_NORM else path_of(site.node)


def owner(site: Site) -> str:
    """Path of the layer whose parameters a site reads."""
    weight = next((n for n in site.node.all_input_nodes if n.op == "get_attr"), None)
    if weight is None:
        return path_of(site.node)
    return str(weight.target).rpartition(".")[0] or str(weight.target)
