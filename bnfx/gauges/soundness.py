"""Gauges that are right in exact arithmetic and lose digits in a stored dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import fx

from bnfx.gauges.constraints import Constraints, Kind, Site, Systems
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

    def __init__(self, found: Constraints, of: Ints, limit: float) -> None:
        self.found = found
        self.limit = limit
        counts = np.zeros(len(of), np.int64)
        for labels in found.readers.values():
            np.add.at(counts, np.unique(of[labels]), 1)
        self.several: Flags = counts[of] > 1
        self._norms = [site for site in found.sites.values() if len(site.mean)]

    def settled_too_far(self, systems: Systems, sites: Sequence[Site] | None = None) -> Flags:
        """Whether displacements that are settled already move the inputs of norms too far.

        Args:
            systems: What holds so far.
            sites: The norms to ask about; None for all.

        Returns:
            One flag for each channel of all the norms, one after the other.
        """
        sites = self._norms if sites is None else [site for site in sites if len(site.mean)]
        if not sites:
            return np.zeros(0, bool)
        labels = systems.of[np.concatenate([site.x for site in sites])]
        known = systems.shift.substituted(Rows.of((labels, 1.0)))
        shift = np.where((known.unknowns < 0).all(axis=1), known.constant, 0.0)
        ends = np.cumsum([len(site.x) for site in sites])[:-1]
        parts = zip(sites, np.split(shift, ends), strict=True)
        return np.concatenate([self._far(site, part) for site, part in parts])

    def ill(
        self, systems: Systems, chosen: Iterable[Site], scale: Floats, shift: Floats
    ) -> dict[fx.Node, Refused]:
        """Sites whose elimination costs digits, and why; empty where the gauges are sound."""
        chosen = list(chosen)
        return self._displaced(chosen, shift) or self._stretched(systems, chosen, scale)

    def _far(self, site: Site, shift: Floats) -> Flags:
        """(channels,): whether `shift` moves the input of a norm too far for its other readers."""
        with np.errstate(all="ignore"):
            moved = np.abs(site.mean + shift)
            far = moved > np.maximum(_MAX_SHIFT * site.std, np.abs(site.mean) * 1.5)
        return np.asarray(far & self.several[site.x] & (shift != 0))

    def _displaced(self, chosen: list[Site], shift: Floats) -> dict[fx.Node, Refused]:
        eliminated = {site.node for site in chosen}
        bad: dict[fx.Node, Refused] = {}
        for site in self._norms:
            far = self._far(site, shift[site.x])
            if not far.any():
                continue
            culprits = [site] if site.node in eliminated else _sharing(chosen, site.x[far])
            for culprit in culprits or chosen:
                bad[culprit.node] = Refused("", np.flatnonzero(far), TOO_FAR)
        return bad

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
