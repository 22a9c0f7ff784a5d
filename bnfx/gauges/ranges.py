"""Folds that leave the range of a 16-bit dtype although the source stays within it.

A weight may overflow or lose its digits below the smallest normal number, a bias be so large that
W x = y - b overflows, and a tensor that is carried as a (x + d) be too large itself, of which the
statistics of a BatchNorm tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from bnfx.gauges.choice import Gauges
from bnfx.gauges.constraints import LINEAR, Constraints, Kind, Site
from bnfx.gauges.elimination import Refused
from bnfx.gauges.linear_system import Flags
from bnfx.gauges.new_weights import Ends, change_of
from bnfx.graphs.constants import Values
from bnfx.graphs.shapes import Shapes, is_tensor
from bnfx.numbers import Floats

#: Dtypes of 16 bits.
HALF = (torch.float16, torch.bfloat16)
#: Of the largest number: what is added may take a quarter, what flows half.
_ADDED, _FLOWING = 0.25, 0.5
#: How far a tensor may be from its mean, in standard deviations.
_SPREAD = 8.0


def beyond_range(
    dtypes: Mapping[str, torch.dtype],
    shapes: Shapes,
    values: Values,
    found: Constraints,
    gauges: Gauges,
    dead: Mapping[fx.Node, Mapping[int, float]],
) -> dict[fx.Node, Refused]:
    """Eliminated sites whose fold leaves the range, and why; empty where all is well.

    Args:
        dtypes: Constants by name -> the dtype in which they end.
        shapes: Its values' shapes and dtypes.
        values: Values of its constants.
        found: Its sites.
        gauges: The solution.
        dead: Layers whose outputs become constant on some channels.
    """
    gone = {site.node for site in gauges.eliminated}
    bad: dict[fx.Node, Refused] = {}
    for site in found.sites.values():
        dtype = _stored(site, values, dtypes)
        flowing = shapes.values.get(site.node)
        if is_tensor(flowing) and flowing.dtype in HALF:
            lanes = _too_large(site, gauges, flowing.dtype)
        elif dtype in HALF:
            lanes = np.zeros(len(site.y), bool)
        else:
            continue
        if site.node not in gone and dtype in HALF:
            change = change_of(site, Ends.of(site, gauges), values, dead.get(site.node, {}))
            if change is not None and any(_spoiled(v, n, dtype) for n, v in change.tensors.items()):
                lanes = np.ones(len(site.y), bool)
        if lanes.any():
            words = (
                f"folded, its layers would leave the range of {str(dtype).removeprefix('torch.')} "
                "where the model does not, which costs digits"
            )
            for culprit in _tied(site, gauges):
                bad[culprit.node] = Refused("", np.zeros(0, np.int64), words)
    return bad


def _stored(site: Site, values: Values, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype in which the parameters of a site end."""
    names = [name for node in site.node.all_input_nodes for name in values.sources(node)]
    half = [dtypes[name] for name in names if dtypes[name] in HALF]
    if half and site.kind in (*LINEAR, Kind.NORM):
        return half[0]
    return site.like.dtype if site.like is not None else torch.float64


def _too_large(site: Site, gauges: Gauges, dtype: torch.dtype) -> Flags:
    """(channels,), whether the input of a norm is carried too large, and was not."""
    if not len(site.mean):
        return np.zeros(len(site.y), bool)
    a, d = gauges.scale[site.x], gauges.shift[site.x]
    size: Floats = np.abs(a) * (np.abs(site.mean + d) + _SPREAD * site.std)
    return np.asarray((size > _FLOWING * torch.finfo(dtype).max) & ((a != 1) | (d != 0)))


def _spoiled(value: Tensor, name: str, dtype: torch.dtype) -> bool:
    """Whether a new tensor overflows, or a part of it loses digits when it is stored."""
    info = torch.finfo(dtype)
    if name in ("bias", "addend", "border", "running_mean"):
        return bool((value.abs() > _ADDED * info.max).any())
    lost = (value.to(dtype).double() - value).abs()
    return bool((lost > info.eps * value.abs().max()).any()) and value.numel() > 0


def _tied(site: Site, gauges: Gauges) -> list[Site]:
    """Eliminated sites on the tensors that `site` reads or gives; all where none is."""
    of = gauges.systems.of
    mine = np.unique(of[np.append(site.x, site.y)])
    mine = mine[mine > 0]
    near = [
        s for s in gauges.eliminated if s is site or np.isin(of[np.append(s.x, s.y)], mine).any()
    ]
    return near or list(gauges.eliminated)
