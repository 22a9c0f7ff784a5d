"""Why a BatchNorm stays, into which layers the others went, and what a weight was made from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import fx

from bnfx.gauges.choice import Gauges
from bnfx.gauges.constraints import Constraints, Demand, Kind, Site, components
from bnfx.gauges.elimination import Refused, absorber
from bnfx.gauges.new_weights import Pending
from bnfx.graphs.constants import Values
from bnfx.graphs.naming import channels, describe, norm_path, path_of
from bnfx.numbers import Ints

UNCARRIED = "no weight has to carry it: it is an identity, or its neighbours undo it"

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
        self._of_changed = _ends(of, self.changed)
        self._of_gone = _ends(of, gauges.eliminated)

    # -- into ----------------------------------------------------------------------------------

    def into(self, site: Site) -> tuple[str, ...]:
        """Layers whose weights carry the site now: those next to it that were rewritten."""
        of = self.gauges.systems.of
        labels = np.unique(of[np.append(site.x, site.y)])
        eliminated = self.gauges.eliminated
        crossed = {i for i, s in enumerate(eliminated) if s is site}
        for _ in range(len(eliminated) + _HOPS):
            hit = np.unique(self._of_changed.at(labels[labels > 0])).tolist()
            if hit:
                return tuple(dict.fromkeys(owner(self.changed[i]) for i in hit))
            new = sorted(set(self._of_gone.at(labels).tolist()) - crossed)
            crossed.update(new)
            more = [eliminated[i] for i in new]
            ends = [of[np.append(b.x, b.y)] for b in more] or self._beside(labels)
            labels = np.unique(np.concatenate([labels, *ends]))
        return ()

    def _beside(self, labels: Ints) -> list[Ints]:
        """Labels that share an equation with some of `labels`, the ground left out."""
        by_label, by_row = self._equations
        return [by_row.at(np.unique(by_label.at(labels[labels > 0])))]

    @functools.cached_property
    def _equations(self) -> tuple[_Index, _Index]:
        """Rows of all demands by the classes of their labels, and the other way round."""
        of, labels, rows, count = self.gauges.systems.of, [], [], 0
        for batch in self.found.batches:
            for part in batch.labels:
                labels.append(of[part])
                rows.append(np.arange(count, count + len(part)))
            count += len(batch.labels[0])
        names = np.concatenate([*labels, np.zeros(0, np.int64)])
        places = np.concatenate([*rows, np.zeros(0, np.int64)])
        return _Index(names, places), _Index(places, names)

    # -- reasons -------------------------------------------------------------------------------

    def reason(self, site: Site) -> str:
        """What keeps the site."""
        refused = self.gauges.refused.get(site.node)
        if refused is None:  # seen at ranks that others than the assumed ones would have
            return "the shape of its input is unknown without example_inputs; pass them"
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
        if not sides:
            return f"its {refused.part} on {where} is fixed: what it reads is tied to what it gives"
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
                if batch.soft:  # it has given way
                    continue
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


class _Index:
    """Finds members by their labels; a member may have many, and a label many members."""

    def __init__(self, labels: Ints, members: Ints) -> None:
        order = np.argsort(labels, kind="stable")
        self._labels, self._members = labels[order], members[order]

    def at(self, labels: Ints) -> Ints:
        """Members that have one of `labels`, each as often as it has them."""
        low = np.searchsorted(self._labels, labels, "left")
        counts = np.searchsorted(self._labels, labels, "right") - low
        starts = np.repeat(low - np.cumsum(counts) + counts, counts)
        return self._members[starts + np.arange(len(starts))]


def _ends(of: Ints, sites: Sequence[Site]) -> _Index:
    """Classes of labels -> the sites at which they end, an input or an output."""
    ends = [np.unique(of[np.append(site.x, site.y)]) for site in sites]
    sizes = [len(end) for end in ends]
    return _Index(
        np.concatenate([*ends, np.zeros(0, np.int64)]), np.repeat(np.arange(len(ends)), sizes)
    )


def _path(site: Site) -> str:
    return norm_path(site.node) if site.kind is Kind.BATCH_NORM else path_of(site.node)


def owner(site: Site) -> str:
    """Path of the layer whose parameters a site reads."""
    weight = next((n for n in site.node.all_input_nodes if n.op == "get_attr"), None)
    if weight is None:
        return path_of(site.node)
    return str(weight.target).rpartition(".")[0] or str(weight.target)


def vanished_into(
    found: Constraints, gauges: Gauges, values: Values
) -> Callable[[Site], tuple[str, ...]]:
    """For a site that stays: parameters of the eliminated ones that its gauges may depend on.

    Two sites depend on each other where demands tie their gauges; a gauge of a = 1 and d = 0 ties
    nothing.
    """
    plain = (gauges.scale == 1.0) & (gauges.shift == 0.0)
    of = np.where(plain, 0, gauges.systems.of)
    tied = components(found, of, gauges.eliminated)
    by_group: dict[int, dict[str, None]] = {}
    by_layer: dict[fx.Node, dict[str, None]] = {}
    gone = {site.node for site in gauges.eliminated}
    for site in gauges.eliminated:
        operands = [node for node in site.node.all_input_nodes if node is not site.source]
        names = dict.fromkeys(name for node in operands for name in values.sources(node))
        for group in _groups(tied, site):
            by_group.setdefault(group, {}).update(names)
        layer = absorber(found, site, gone) if len(gauges.backward(site)) else None
        if layer is not None:  # it gives a constant where s = 0
            by_layer.setdefault(layer.node, {}).update(names)

    def sources(site: Site) -> tuple[str, ...]:
        names = dict(by_layer.get(site.node, {}))
        for group in _groups(tied, site):
            names.update(by_group.get(group, {}))
        return tuple(names)

    return sources


def _groups(tied: Ints, site: Site) -> list[int]:
    groups = np.unique(tied[np.append(site.x, site.y)])
    found: list[int] = groups[groups > 0].tolist()
    return found
