"""Values of all gauges, once it is settled which equations hold.

What the equations leave free becomes the scale that leaves most weights as they are, and d = 0.
"""

from __future__ import annotations

import numpy as np

from bnfx.gauges.constraints import Constraints, Kind, Systems
from bnfx.gauges.linear_system import Rows
from bnfx.numbers import Floats, Ints

_SAME = 1e-9


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
