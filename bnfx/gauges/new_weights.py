"""Write gauges into weights: everything in float64, rounded once to the stored dtype.

With x' = a (x + d) on inputs (i) and outputs (o):

    y = W * x + b       W' = a_o W / a_i            b' = a_o (b + d_o - sum W d_i)
    layer, group norm   w' = a_o w                  b' = a_o (b + d_o)
    BatchNorm, kept     mean' = a_i (mean + d_i)    var' + eps = a_i^2 (var + eps)
                        gamma' = +- gamma a_o       beta' = a_o (beta + d_o)
    y = k x             k' = a_o k / a_i
    y = x + k           k' = a_o (k + d_o - d_i)
    y = k - x           k' = a_o (k + d_o + d_i)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnfx.gauges.choice import Gauges
from bnfx.gauges.constraints import Bounds, Kind, Site
from bnfx.graphs.constants import Values
from bnfx.graphs.mapped import unfilled
from bnfx.graphs.norms import STATE, norm_call
from bnfx.numbers import Floats
from bnfx.operators.calls import argument
from bnfx.operators.table import Operator, affine_of, layer_call

#: Gauges closer to trivial than this leave their weights untouched.
_TRIVIAL = 1e-13
#: Numbers of a weight that are held in float64 at once, unless one output channel has more.
_SLAB = 2**15


@dataclass(frozen=True)
class Change:
    """New parameters of one call."""

    #: The call.
    site: Site
    #: Argument name -> new value, in float64 or in the stored dtype.
    tensors: Mapping[str, Tensor]
    #: Names of the call's own parameters that the values were computed from.
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Pending:
    """A change to come: its float64 tensors exist for one call at a time, while it is written."""

    #: The call.
    site: Site
    #: `change_of` for the call, short of `rounded`.
    compute: Callable[..., Change | None]
    #: Names of the parameters of what vanished into the call.
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


def is_changed(site: Site, ends: Ends, dead: Mapping[int, float]) -> bool:
    """Whether `change_of` has anything to give."""
    if site.kind is Kind.SCALE and (np.abs(ends.a_o / ends.a_i - 1.0) <= _TRIVIAL).all():
        return False
    if site.kind is Kind.SHIFT and (ends.a_o == 1).all() and (ends.d_o == ends.d_i).all():
        return False
    return bool(dead) or not ends.trivial()


def change_of(
    site: Site,
    ends: Ends,
    values: Values,
    dead: Mapping[int, float],
    *,
    rounded: bool = False,
) -> Change | None:
    """The new parameters of a site that stays in the graph; None if they are the old ones.

    Args:
        site: An affine layer, a norm or a constant.
        ends: Its gauges.
        values: Values of the constants.
        dead: Output channels that become constant -> that constant.
        rounded: Whether weights of layers get their stored dtype at once, which takes less memory.
    """
    if not is_changed(site, ends, dead):
        return None
    if site.kind is Kind.AFFINE:
        return _affine(site, ends, values, dead, rounded=rounded)
    if site.kind is Kind.PRODUCT:
        return _product(site, ends, values, dead)
    if site.kind is Kind.NORM:
        return _deadened(_norm(site, ends, values), dead)
    if site.kind is Kind.BATCH_NORM:
        return _deadened(_batch_norm(site, ends, values), dead)
    return _constant(site, ends)


@dataclass(frozen=True)
class _Layout:
    """A weight as (groups, outputs of a group, inputs of a group, *kernel), without a copy."""

    row: Operator
    groups: int

    def of(self, weight: Tensor) -> Tensor:
        """The view."""
        grouped: Tensor = weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2) if self.row.transposed else grouped

    def outputs(self, values: Tensor, like: Tensor) -> Tensor:
        """(out,) in the shape in which it multiplies the view `like`."""
        return values.reshape(self.groups, -1, *[1] * (like.dim() - 2))

    def inputs(self, values: Tensor, like: Tensor) -> Tensor:
        """(in,), likewise."""
        return values.reshape(self.groups, 1, -1, *[1] * (like.dim() - 3))


def _slabs(view: Tensor) -> Iterator[tuple[slice, slice]]:
    """Groups and outputs that are computed at once, so that no whole weight exists in float64."""
    groups, outputs = view.shape[:2]
    row = max(1, view[:1, :1].numel())
    if outputs * row <= _SLAB:
        step = max(1, _SLAB // max(1, outputs * row))
        yield from ((slice(at, at + step), slice(None)) for at in range(0, groups, step))
        return
    step = max(1, _SLAB // row)
    for group in range(groups):
        for at in range(0, outputs, step):
            yield slice(group, group + 1), slice(at, at + step)


def _affine(
    site: Site, ends: Ends, values: Values, dead: Mapping[int, float], *, rounded: bool
) -> Change:
    row = affine_of(site.node)
    assert row is not None
    assert site.like is not None
    call = layer_call(site.node)
    weight, bias = values.of(call["weight"]), values.of(call["bias"])
    assert weight is not None
    a_i, d_i, a_o, d_o = map(_tensor, (ends.a_i, ends.d_i, ends.a_o, ends.d_o))
    old = torch.zeros_like(a_o) if bias is None else bias.detach().cpu().double()
    kept = torch.ones_like(a_o)
    kept[list(dead)] = 0.0
    borders = bool(site.size) and bool((d_i != 0).any())
    dtype = site.like.dtype if rounded else torch.float64
    new = unfilled(weight.shape, dtype)
    layout = _Layout(row, int(call["groups"]))
    moved = _scale_into(new, weight.detach(), layout, (a_i, a_o * kept), d_i)
    new_bias = a_o * (old + d_o - (0.0 if borders else moved))
    for channel, value in dead.items():
        new_bias[channel] = value
    tensors = {"weight": new}
    if borders:
        wide = weight.detach().cpu().double()
        tensors["border"] = -_border(wide, d_i, a_o * kept, call, site.size)
    if bias is not None or bool((new_bias != 0).any()):
        tensors["bias"] = new_bias
    return Change(site, tensors, _sources(values, call["weight"], call["bias"]))


def _product(site: Site, ends: Ends, values: Values, dead: Mapping[int, float]) -> Change:
    """W' = a_o W / a_i, and what is added: b' = a_o (beta b + d_o - alpha sum W d_i) / beta."""
    product = site.product
    assert product is not None
    weight, bias = values.of(product.weight), values.of(product.bias)
    assert weight is not None
    a_i, d_i, a_o, d_o = map(_tensor, (ends.a_i, ends.d_i, ends.a_o, ends.d_o))
    rows = product.rows(weight.detach().cpu().double())
    groups, outputs, inputs = rows.shape
    old = torch.zeros_like(a_o)
    if bias is not None:
        old = product.beta * bias.detach().cpu().double().reshape(-1).expand_as(a_o)
    moved = product.alpha * (rows * d_i.reshape(groups, 1, inputs)).sum(2).flatten()
    added = a_o * (old + d_o - moved)
    kept = torch.ones_like(a_o)
    for channel, value in dead.items():
        kept[channel], added[channel] = 0.0, value
    factor = (a_o * kept).reshape(groups, outputs, 1)
    new = rows * (1.0 / a_i).reshape(groups, 1, inputs) * factor
    tensors = {"weight": product.weight_of(new, weight)}
    if bias is not None:
        tensors["bias"] = added / product.beta
    elif bool((added != 0).any()):
        tensors["addend"] = product.over_outputs(added, weight)
    return Change(site, tensors, _sources(values, product.weight, product.bias))


def _scale_into(
    new: Tensor, weight: Tensor, layout: _Layout, scales: tuple[Tensor, Tensor], d_i: Tensor
) -> Tensor:
    """Write a_o W / a_i into `new`, slab by slab in float64. (out,): sum W d_i.

    An output channel is never cut, so the sum has one order whatever the slabs are.
    """
    source, target = layout.of(weight), layout.of(new)
    inverse, factor = layout.inputs(1.0 / scales[0], source), layout.outputs(scales[1], source)
    shift = layout.inputs(d_i, source)
    moved = torch.zeros(source.shape[:2], dtype=torch.float64, device="cpu")
    shifted = bool((d_i != 0).any())
    for part in _slabs(source):
        wide = torch.empty(source[part].shape, dtype=torch.float64, device="cpu").copy_(
            source[part]
        )
        if shifted:
            moved[part] = (wide * shift[part[0]]).flatten(2).sum(2)
        target[part] = wide.mul_(inverse[part[0]]).mul_(factor[part])
    return moved.flatten()


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
    if site.kind is Kind.MIRROR:
        return Change(site, {"constant": a_o * (site.constant + d_o + d_i)}, ())
    return Change(site, {"constant": a_o * (site.constant + d_o - d_i)}, ())


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _sources(values: Values, *nodes: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for node in nodes for name in values.sources(node)))
