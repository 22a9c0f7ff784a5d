"""Gauges that are right in exact arithmetic and lose digits in a stored dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from torch import fx

from bnfx.gauges.constraints import Constraints, Kind, Site, Systems, components
from bnfx.gauges.elimination import Refused
from bnfx.gauges.linear_system import Flags, Rows
from bnfx.numbers import Floats, Ints

#: |log a| that a stored weight may gain without leaving the range of its dtype.
WIDE, NARROW = float(np.log(1e6)), float(np.log(2.0**8))

#: Displacements are refused that move a tensor with several readers further than this, in its
#: own standard deviations: the readers would subtract what was added, and lose digits.
_MAX_SHIFT = 8.0
TOO_FAR = (
    f"its shift would move a tensor with several readers by more than {_MAX_SHIFT:g} standard "
    "deviations, which costs digits"
)


class Soundness:
    """Judges the gauges of one graph.

    Attributes:
        found: Labels and demands.
        several: (labels,), whether more than one call reads the gauge.
        limit: Largest |log a|.
    """

    def __init__(
        self, found: Constraints, of: Ints, candidates: Sequence[Site], limit: float
    ) -> None:
        self.found = found
        self.limit = limit
        self._of = of
        self._candidates = candidates
        counts = np.zeros(len(of), np.int64)
        for labels in found.readers.values():
            np.add.at(counts, np.unique(of[labels]), 1)
        self.several: Flags = counts[of] > 1
        self._norms = [site for site in found.sites.values() if len(site.mean)]

    @functools.cached_property
    def _tied(self) -> Ints:
        return components(self.found, self._of, self._candidates)

    def settled_too_far(self, systems: Systems, sites: Sequence[Site] | None = None) -> Flags:
        """Whether displacements that are settled already move what norms read or give too far.

        Args:
            systems: What holds so far.
            sites: The norms to ask about; None for all.

        Returns:
            One flag for each channel of all the norms, one after the other.
        """
        sites = self._norms if sites is None else [site for site in sites if len(site.mean)]
        if not sites:
            return np.zeros(0, bool)
        labels = systems.of[np.concatenate([(site.x, site.y) for site in sites], axis=1)]
        known = systems.shift.substituted(Rows.of((labels.reshape(-1), 1.0)))
        shift = np.where((known.unknowns < 0).all(axis=1), known.constant, 0.0)
        ends = np.cumsum([len(site.x) for site in sites])[:-1]
        parts = zip(sites, np.split(shift.reshape(2, -1), ends, axis=1), strict=True)
        return np.concatenate([self._far(site, *part) for site, part in parts])

    def ill(
        self, systems: Systems, chosen: Iterable[Site], scale: Floats, shift: Floats
    ) -> dict[fx.Node, Refused]:
        """Sites whose elimination costs digits, and why; empty where the gauges are sound."""
        chosen = list(chosen)
        return (
            self._displaced(chosen, shift)
            or self._carried_off(chosen, shift)
            or self._stretched(systems, chosen, scale)
        )

    def _far(self, site: Site, before: Floats, after: Floats) -> Flags:
        """(channels,): whether the input or the output of a norm moves too far for its readers.

        The statistics of the output are those of the input behind the norm's own map.
        """
        with np.errstate(all="ignore"):
            mean, std = site.s * site.mean + site.t, np.abs(site.s) * site.std
        far = self._moved_far(site.x, site.mean, site.std, before)
        return far | self._moved_far(site.y, mean, std, after)

    def _moved_far(self, labels: Ints, mean: Floats, std: Floats, shift: Floats) -> Flags:
        with np.errstate(all="ignore"):
            far = np.abs(mean + shift) > np.maximum(_MAX_SHIFT * std, np.abs(mean) * 1.5)
        return np.asarray(far & self.several[labels] & (shift != 0))

    def _displaced(self, chosen: list[Site], shift: Floats) -> dict[fx.Node, Refused]:
        eliminated = {site.node for site in chosen}
        bad: dict[fx.Node, Refused] = {}
        for site in self._norms:
            far = self._far(site, shift[site.x], shift[site.y])
            if not far.any():
                continue
            culprits = (
                [site]
                if site.node in eliminated
                else _sharing(chosen, np.append(site.x[far], site.y[far]))
            )
            for culprit in culprits or chosen:
                bad[culprit.node] = Refused("", np.flatnonzero(far), TOO_FAR)
        return bad

    def _carried_off(self, chosen: list[Site], shift: Floats) -> dict[fx.Node, Refused]:
        """The site that moves tensors of which no norm knows how far they spread.

        The largest spread that is known of a tensor tied to them stands for theirs; where none is
        known, the largest constant that is added there.
        """
        spread, known = np.zeros(self.found.count), np.zeros(self.found.count, bool)
        for site in self._norms:
            with np.errstate(all="ignore"):
                after = np.abs(site.s) * site.std + np.abs(site.s * site.mean + site.t)
            for labels, width in ((site.x, site.std + np.abs(site.mean)), (site.y, after)):
                np.maximum.at(spread, self._tied[labels], np.nan_to_num(width, posinf=0.0))
                known[self._of[labels]] = True
        added = np.zeros(self.found.count)
        for site in self.found.sites.values():
            if site.kind is Kind.SHIFT:
                np.maximum.at(added, self._tied[site.y], np.abs(site.t).max(initial=0.0))
        limit = _MAX_SHIFT * np.where(spread > 0, spread, added)[self._tied]
        far = self.several & ~known[self._of] & (limit > 0) & (np.abs(shift) > limit)
        far[0] = False
        if not far.any():
            return {}
        moving = _sharing(chosen, np.flatnonzero(np.isin(self._tied, self._tied[far])))
        if not moving:
            return {}
        worst = max(moving, key=lambda site: np.abs(shift[np.append(site.x, site.y)]).max())
        return {worst.node: Refused("", np.zeros(0, np.int64), TOO_FAR)}

    def _stretched(
        self, systems: Systems, chosen: list[Site], scale: Floats
    ) -> dict[fx.Node, Refused]:
        with np.errstate(divide="ignore"):  # a scale that vanished is refused for its size
            logs = np.abs(np.log(np.abs(scale)))
        private = np.zeros(len(scale), bool)
        for site in chosen:  # a layer's own output, which nothing but this site reads
            if site.node.args and site.kind is Kind.BATCH_NORM:
                private[site.x[~self.several[site.x]]] = True
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
