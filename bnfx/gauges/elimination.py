"""What it takes for one BatchNorm or constant to vanish.

A site y = s x + t is eliminated iff, for each channel,

    a_x = s a_y        and        d_y = s d_x - t.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch import fx

from bnfx.gauges.constraints import CONSTANTS, LINEAR, Constraints, Site, Systems
from bnfx.gauges.linear_system import LinearSystem, Rows
from bnfx.graphs.constants import readers
from bnfx.numbers import Ints

ZERO = "its scale is zero, and what it reads is not the output of a layer that it alone reads"

NEEDED = "one behind it has a scale of zero, and gives its constant through it"


@dataclass(frozen=True)
class Refused:
    """Why a site stays."""

    #: "scale", "sign", "shift", or "" for a reason of its own.
    part: str
    #: Channels on which its equation contradicts the others.
    channels: Ints
    #: The reason, where it is one of its own.
    words: str = ""


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


class Forward:
    """Channels of zero scale that the layers behind take up: no division, W becomes 0 there.

    y = 0 x + t is constant, whatever x is. Where affine layers alone read that channel, and all
    their outputs see all of it, W' = 0 in its column and b' = b + W t.
    """

    def __init__(self, found: Constraints) -> None:
        self._taken = np.zeros(found.count, bool)
        self._taken[0] = True
        for batch in found.batches:
            for labels in batch.labels:
                self._taken[labels] = True
        for site in found.sites.values():
            if site.kind not in LINEAR:
                self._taken[site.x] = True

    def takes(self, site: Site) -> bool:
        """Whether that holds for all channels of `site` whose scale is zero."""
        return not self._taken[site.y[site.s == 0]].any()


def absorber(found: Constraints, site: Site, gone: Collection[fx.Node]) -> Site | None:
    """The layer or kept BatchNorm that alone feeds `site`, through BatchNorms that are gone.

    Where s = 0 it may give the constant t instead of its own channel.
    """
    current = site
    while current.source is not None and len(readers(current.source)) == 1:
        before = found.sites.get(current.source)
        if before is None or not np.array_equal(before.y, current.x):
            return None
        if current.source not in gone:
            return None if before.kind in CONSTANTS else before
        current = before
    return None
