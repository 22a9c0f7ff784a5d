"""Rules of sums, products and extrema, of two tensors or of one and a constant."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from bnfx.gauges.constraints import Cause, Demand, Kind, Site
from bnfx.gauges.labels import compact, ground_map
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.numbers import Ints
from bnfx.operators.calls import argument, base_name, call_name
from bnfx.operators.table import Passage, passage_of


def add(walk: Walk, node: fx.Node) -> Tensor:
    """x1 + x2 and x1 - x2: one scale, d_o = d_1 +- d_2; a constant absorbs any displacement."""
    sign = -1.0 if passage_of(node) is Passage.SUBTRACT else 1.0
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise Opaque
    if base_name(call_name(node)) == "rsub":
        a, b = b, a
    known = walk.values.operand(b)
    if known is not None:
        return _shift(walk, node, a, sign * known, Kind.SHIFT)
    known = walk.values.operand(a)
    if known is not None:
        return _shift(walk, node, b, known, Kind.SHIFT if sign > 0 else Kind.MIRROR)
    if a is not argument(node, 0, "input"):
        raise Opaque
    return _combined(walk, node, Demand.SUM, sign)


def negate(walk: Walk, node: fx.Node) -> Tensor:
    """-x: the same scale, d_o = -d."""
    labels = compact(walk.labels_of(argument(node, 0, "input")))
    keys, where = np.unique(labels.numpy(), return_inverse=True)
    y, used, cause = np.zeros_like(keys), keys > 0, Cause(node, describe(node))
    y[used] = walk.found.fresh(node, "y", int(used.sum()))
    out, x = y[used], keys[used]
    walk.found.demand(Demand.SAME_SCALE, out, x, cause=cause)
    walk.found.demand(Demand.SUM, out, x, np.zeros_like(x), factors=(-1.0, 0.0), cause=cause)
    walk.found.readers[node, 0] = x
    return torch.from_numpy(y[where.reshape(-1)]).reshape(labels.shape).expand(walk.shape_of(node))


def multiply(walk: Walk, node: fx.Node) -> Tensor:
    """x1 * x2 and x1 / x2: a_o = a_1 a_2^(+-1), all d = 0; a constant factor k has d_y = k d_x."""
    divides = passage_of(node) is Passage.DIVIDE
    if node.kwargs.get("rounding_mode") is not None:
        raise Opaque
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    known = walk.values.operand(b)
    if known is not None:
        if divides and not bool((known != 0).all()):
            raise Opaque
        return _scale(walk, node, a, known.reciprocal() if divides else known)
    known = walk.values.operand(a)
    if known is not None and not divides:
        return _scale(walk, node, b, known)
    return _combined(walk, node, Demand.GATE, -1.0 if divides else 1.0)


def extremum(walk: Walk, node: fx.Node) -> Tensor:
    """The larger or smaller of two tensors: one gauge, a > 0."""
    first, second, shape = _pair(walk, node)
    cause = Cause(node, describe(node))
    walk.found.demand(Demand.SAME, first, second, cause=cause)
    walk.positive(first, cause)
    return torch.from_numpy(first).reshape(shape).expand(walk.shape_of(node))


def _combined(walk: Walk, node: fx.Node, demand: Demand, factor: float) -> Tensor:
    """A sum or a product of two tensors that are both computed."""
    first, second, small = _pair(walk, node)
    cause = Cause(node, describe(node))
    one, two, where = _pairs(first, second)
    y = np.zeros(len(one), np.int64)
    used = (one > 0) | (two > 0)
    y[used] = walk.found.fresh(node, "y", int(used.sum()))
    one, two, out = one[used], two[used], y[used]
    if demand is Demand.SUM:
        walk.found.demand(Demand.SAME_SCALE, out, one, cause=cause)
        walk.found.demand(Demand.SAME_SCALE, out, two, cause=cause)
        walk.found.demand(demand, out, one, two, factors=(1.0, factor), cause=cause)
    else:
        walk.found.demand(demand, out, one, two, factors=(factor,), cause=cause)
        for labels in (out, one, two):
            walk.unshifted(labels, cause)
    walk.found.readers[node, 0] = np.unique(one)
    walk.found.readers[node, 1] = np.unique(two)
    return torch.from_numpy(y[where]).reshape(small).expand(walk.shape_of(node))


def _shift(walk: Walk, node: fx.Node, value: object, k: Tensor, kind: Kind) -> Tensor:
    site, out, _ = _constant_site(walk, node, value, k, kind)
    cause = Cause(node, describe(node))
    walk.found.demand(Demand.SAME_SCALE, site.x, site.y, cause=cause)
    walk.found.absorbers.append(site.y)
    return out


def _scale(walk: Walk, node: fx.Node, value: object, k: Tensor) -> Tensor:
    site, out, uniform = _constant_site(walk, node, value, k, Kind.SCALE)
    cause = Cause(node, describe(node))
    if uniform:
        zero = np.zeros_like(site.x)
        walk.found.demand(Demand.SUM, site.y, site.x, zero, factors=(site.s, 0.0), cause=cause)
    else:
        walk.unshifted(site.x, cause)
        walk.unshifted(site.y, cause)
    return out


def _constant_site(
    walk: Walk, node: fx.Node, value: object, k: Tensor, kind: Kind
) -> tuple[Site, Tensor, bool]:
    """The labels of a call with a constant; whether it is equal where labels are."""
    shape = walk.shape_of(node)
    labels = compact(walk.labels_of(value).expand(shape))
    if k.dim() > len(shape):
        raise Opaque
    split = sum(n > 1 for n in k.shape) <= 1
    if split:  # one number for each channel gives each a gauge of its own
        labels = torch.broadcast_tensors(labels, k)[0]
    known = k.expand_as(labels) if split else torch.zeros_like(labels)
    _, codes = np.unique(known.reshape(-1).double().numpy(), return_inverse=True)
    x, _, inverse = _pairs(labels.reshape(-1).numpy(), codes.reshape(-1))
    y = walk.found.fresh(node, "y", len(x))
    where = torch.from_numpy(inverse).reshape(labels.shape)
    spread, wide = torch.broadcast_tensors(where, k)
    flat, numbers = spread.reshape(-1).numpy(), wide.reshape(-1).double().numpy()
    first = np.zeros(len(x))
    first[flat[::-1]] = numbers[::-1]
    uniform = bool(np.array_equal(first[flat], numbers))
    one = np.ones_like(first)
    s, t = (one, first) if kind is Kind.SHIFT else (first, np.zeros_like(first))
    if not uniform or kind is Kind.MIRROR:
        s = t = np.zeros(0)
    operand = "other" if value is argument(node, 0, "input") else "input"
    site = Site(
        node=node,
        kind=kind,
        x=x,
        y=y,
        s=s,
        t=t,
        source=value if isinstance(value, fx.Node) else None,
        operand=operand,
        like=walk.shapes.values[node],
        where=where,
        constant=k,
    )
    walk.found.readers[node, 0] = np.unique(x)
    walk.found.site(site)
    return site, torch.from_numpy(y)[where].expand(shape), uniform


def _pairs(first: Ints, second: Ints) -> tuple[Ints, Ints, Ints]:
    """The different pairs in order, and which of them each place has.

    One number for a pair: sorting numbers is some twenty times as fast as sorting columns.
    """
    count = int(second.max(initial=0)) + 1
    keys, where = np.unique(first * count + second, return_inverse=True)
    return keys // count, keys % count, where.reshape(-1)


def _pair(walk: Walk, node: fx.Node) -> tuple[Ints, Ints, tuple[int, ...]]:
    shape = walk.shape_of(node)
    small = []
    for value in (argument(node, 0, "input"), argument(node, 1, "other")):
        known = walk.values.of(value)
        if isinstance(value, int | float) or known is not None:
            small.append(ground_map([1] * len(shape)))
        else:
            small.append(compact(walk.labels_of(value).expand(shape)))
    first, second = torch.broadcast_tensors(*small)
    return (
        np.ascontiguousarray(first.reshape(-1).numpy()),
        np.ascontiguousarray(second.reshape(-1).numpy()),
        tuple(first.shape),
    )
