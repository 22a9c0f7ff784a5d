"""From which parameters of the source a rewritten parameter was computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import fx

from bnfx.gauges.choice import Gauges
from bnfx.gauges.constraints import Constraints, Site, components
from bnfx.gauges.elimination import absorber
from bnfx.graphs.constants import Values
from bnfx.numbers import Ints


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
        layer = None if site.s.all() else absorber(found, site, gone)
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
