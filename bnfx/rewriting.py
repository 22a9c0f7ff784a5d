"""Write gauges into weights: everything in float64, rounded once to the stored dtype.

With x' = a (x + d) on inputs (i) and outputs (o):

    y = W * x + b       W' = a_o W / a_i            b' = a_o (b + d_o - sum W d_i)
    layer, group norm   w' = a_o w                  b' = a_o (b + d_o)
    BatchNorm, kept     mean' = a_i (mean + d_i)    var' + eps = a_i^2 (var + eps)
                        gamma' = +- gamma a_o       beta' = a_o (beta + d_o)
    y = k x             k' = a_o k / a_i
    y = x + k           k' = a_o (k + d_o - d_i)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnfx.calls import argument, arguments
from bnfx.constraints import Bounds, Kind, Site
from bnfx.evaluation import Values
from bnfx.gauges import Gauges
from bnfx.linear_system import Floats
from bnfx.norms import STATE, norm_call
from bnfx.operators import Affine, affine_of

#: Gauges closer to trivial than this leave their weights untouched.
_TRIVIAL = 1e-13
#: Numbers of a weight that are held in float64 at once.
_SLAB = 2**17


@dataclass(frozen=True)
class Change:
    """New parameters of one call.

    Attributes:
        site: The call.
        tensors: Argument name -> new value, in float64 or in the stored dtype.
        sources: Names of the call's own parameters that the values were computed from.
    """

    site: Site
    tensors: Mapping[str, Tensor]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Pending:
    """A change to come: its float64 tensors exist for one call at a time, while it is written.

    Attributes:
        site: The call.
        compute: `change_of` for the call, short of `rounded`.
        carries: Names of the parameters of what vanished into the call.
    """

    site: Site
    compute: Callable[..., Change | None]
    carries: tuple[str, ...]


@dataclass(frozen=True)
class Ends:
    """Gauges of one site, float64."""

    a_i: Floats
    d_i: Floats
    a_o: Floats
    d_o: Floats

    @staticmethod
    def of(site: Site, gauges: Gauges) -> Ends:
        """The gauges at the labels of `site`."""
        return Ends(
            gauges.scale[site.x], gauges.shift[site.x], gauges.scale[site.y], gauges.shift[site.y]
        )

    def trivial(self) -> bool:
        """Whether nothing changes."""
        ones = np.abs(np.concatenate([self.a_i, self.a_o]) - 1.0)
        zeros = np.abs(np.concatenate([self.d_i, self.d_o]))
        return bool((ones <= _TRIVIAL).all() and (zeros == 0).all())


def is_changed(site: Site, gauges: Gauges, dead: Mapping[int, float]) -> bool:
    """Whether `change_of` has anything to give."""
    return bool(dead) or not Ends.of(site, gauges).trivial()


def change_of(
    site: Site,
    gauges: Gauges,
    values: Values,
    dead: Mapping[int, float],
    *,
    rounded: bool = False,
) -> Change | None:
    """The new parameters of a site that stays in the graph; None if they are the old ones.

    Args:
        site: An affine layer, a norm or a constant.
        gauges: The solution.
        values: Values of the constants.
        dead: Output channels that become constant -> that constant.
        rounded: Whether weights of layers get their stored dtype at once, which takes less memory.
    """
    ends = Ends.of(site, gauges)
    if ends.trivial() and not dead:
        return None
    if site.kind is Kind.AFFINE:
        return _affine(site, ends, values, dead, rounded=rounded)
    if site.kind is Kind.NORM:
        return _deadened(_norm(site, ends, values), dead)
    if site.kind is Kind.BATCH_NORM:
        return _deadened(_batch_norm(site, ends, values), dead)
    return _constant(site, ends)


def _slabs(weight: Tensor, row: Affine, groups: int) -> list[slice]:
    """Output channels that are computed at once, so that no whole weight exists in float64."""
    if row.transposed or groups > 1:
        return [slice(None)]
    step = max(1, _SLAB * len(weight) // max(1, weight.numel()))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _affine(
    site: Site, ends: Ends, values: Values, dead: Mapping[int, float], *, rounded: bool
) -> Change:
    row = affine_of(site.node, {})
    assert row is not None
    call = arguments(site.node, row.signature)
    weight, bias = values.of(call["weight"]), values.of(call["bias"])
    assert weight is not None
    groups = int(call["groups"])
    a_i, d_i, a_o, d_o = map(_tensor, (ends.a_i, ends.d_i, ends.a_o, ends.d_o))
    old = torch.zeros_like(a_o) if bias is None else bias.detach().cpu().double()
    kill = torch.ones_like(a_o)
    kill[list(dead)] = 0.0
    shifted = bool((d_i != 0).any())
    borders = shifted and bool(site.size)
    moved = torch.zeros_like(a_o)
    assert site.like is not None
    new = torch.empty(weight.shape, dtype=site.like.dtype if rounded else torch.float64)
    for part in _slabs(weight, row, groups):
        wide = weight.detach()[part].cpu().double()
        if shifted and not borders:
            moved[part] = _summed(_times_input(wide, d_i, row, groups), row, groups)
        scaled = _times_output(_times_input(wide, 1.0 / a_i, row, groups), a_o[part], row, groups)
        new[part] = _times_output(scaled, kill[part], row, groups) if dead else scaled
    new_bias = a_o * (old + d_o - moved)
    for channel, value in dead.items():
        new_bias[channel] = value
    tensors = {"weight": new}
    if borders:
        wide = weight.detach().cpu().double()
        tensors["border"] = -_border(wide, d_i, a_o * kill, call, site.size)
    if bias is not None or bool((new_bias != 0).any()):
        tensors["bias"] = new_bias
    return Change(site, tensors, _sources(values, call["weight"], call["bias"]))


def _border(
    weight: Tensor, d: Tensor, a: Tensor, call: Mapping[str, Any], size: tuple[int, ...]
) -> Tensor:
    """What a convolution makes of the image d under zero padding, times a: (out, ...)."""
    image = d.reshape(1, -1, *[1] * len(size)).expand(1, -1, *size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    options = (call["stride"], call["padding"], call["dilation"], call["groups"])
    return convolve(image, weight, None, *options)[0] * a.reshape(-1, *[1] * len(size))


def bounds_of(bounds: Bounds, gauges: Gauges) -> tuple[Tensor | None, Tensor | None] | None:
    """Bounds that carry the gauge, a (bound + d), swapped where a < 0; None if none is needed."""
    a, d = _tensor(gauges.scale)[bounds.labels], _tensor(gauges.shift)[bounds.labels]
    plain = bounds.lower == 0.0 and bounds.upper == np.inf
    same = bool((a > 0).all()) if plain else bool((a == 1).all())
    if same and bool((d == 0).all()):
        return None
    low, high = a * (bounds.lower + d), a * (bounds.upper + d)
    lower, upper = torch.minimum(low, high), torch.maximum(low, high)
    return (
        None if bool(torch.isneginf(lower).all()) else lower,
        None if bool(torch.isposinf(upper).all()) else upper,
    )


def _deadened(change: Change, dead: Mapping[int, float]) -> Change:
    """Weight 0 and the constant as bias on the channels that become constant."""
    for channel, value in dead.items():
        change.tensors["weight"].view(-1)[channel] = 0.0
        change.tensors["bias"].view(-1)[channel] = value
    return change


def _norm(site: Site, ends: Ends, values: Values) -> Change:
    w, b = argument(site.node, 2, "weight"), argument(site.node, 3, "bias")
    weight, bias = values.of(w), values.of(b)
    assert weight is not None
    a_o, d_o = _tensor(ends.a_o), _tensor(ends.d_o)
    wide = weight.detach().cpu().double()
    old = torch.zeros_like(wide) if bias is None else bias.detach().cpu().double()
    a_o, d_o = a_o.reshape(wide.shape), d_o.reshape(wide.shape)
    return Change(site, {"weight": a_o * wide, "bias": a_o * (old + d_o)}, _sources(values, w, b))


def _batch_norm(site: Site, ends: Ends, values: Values) -> Change:
    """Its statistics stay those of its input: folded again, the result gives the same choice."""
    call = norm_call(site.node)
    mean, var, gamma, beta = (values.of(call[k]) for k in STATE)
    assert mean is not None
    assert var is not None
    a_i, d_i, a_o, d_o = map(_tensor, (ends.a_i, ends.d_i, ends.a_o, ends.d_o))
    center, spread = mean.detach().cpu().double(), var.detach().cpu().double()
    g = torch.ones_like(a_o) if gamma is None else gamma.detach().cpu().double()
    b = torch.zeros_like(a_o) if beta is None else beta.detach().cpu().double()
    shown = (spread + call["eps"]) * a_i.square() - call["eps"]
    span = torch.finfo(var.dtype)  # eps is one number for all channels: it can't be less
    fits = (shown >= span.tiny) & (shown <= span.max) & (a_i.abs() != 1)
    return Change(
        site,
        {
            "running_mean": a_i * (center + d_i),
            "running_var": torch.where(fits, shown, spread),
            "weight": g * a_o * torch.where(fits, a_i.sign(), 1.0 / a_i),
            "bias": a_o * (b + d_o),
        },
        _sources(values, *(call[k] for k in STATE)),
    )


def _constant(site: Site, ends: Ends) -> Change:
    assert site.constant is not None
    assert site.where is not None
    index = site.where
    a_i, d_i, a_o, d_o = (_tensor(part)[index] for part in (ends.a_i, ends.d_i, ends.a_o, ends.d_o))
    if site.kind is Kind.SCALE:
        return Change(site, {"constant": a_o * site.constant / a_i}, ())
    return Change(site, {"constant": a_o * (site.constant + d_o - d_i)}, ())


def _times_output(weight: Tensor, factor: Tensor, row: Affine, groups: int) -> Tensor:
    tail = [1] * (weight.dim() - (1 if not row.transposed else 2))
    if not row.transposed:
        return weight * factor.reshape(-1, *tail)
    grouped = weight.unflatten(0, (groups, -1))
    scaled: Tensor = (grouped * factor.reshape(groups, 1, -1, *tail)).flatten(0, 1)
    return scaled


def _times_input(weight: Tensor, factor: Tensor, row: Affine, groups: int) -> Tensor:
    if row.transposed:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    tail = [1] * (weight.dim() - 2)
    grouped = weight.unflatten(0, (groups, -1))
    scaled: Tensor = (grouped * factor.reshape(groups, 1, -1, *tail)).flatten(0, 1)
    return scaled


def _summed(weight: Tensor, row: Affine, groups: int) -> Tensor:
    """Sum over inputs and kernel, for each output channel."""
    space = list(range(2, weight.dim()))
    if not row.transposed:
        return weight.sum(dim=[1, *space])
    grouped = weight.unflatten(0, (groups, -1)).sum(dim=[1, *(axis + 1 for axis in space)])
    total: Tensor = grouped.flatten()
    return total


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _sources(values: Values, *nodes: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for node in nodes for name in values.sources(node)))
