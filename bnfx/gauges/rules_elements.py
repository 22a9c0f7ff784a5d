"""Rules of operators that treat every element alike: identities, rectifiers, clamps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bnfx.gauges.constraints import Bounds, Cause, Demand
from bnfx.gauges.labels import array, compact
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.graphs.shapes import is_tensor
from bnfx.operators.calls import argument, base_name, call_name, function_name


def identity(walk: Walk, node: fx.Node) -> Tensor:
    """The same gauge."""
    labels = walk.labels_of(node.args[0] if node.args else argument(node, 0, "input"))
    value = walk.shapes.values.get(node)
    name = base_name(function_name(node.target))
    random = "dropout" in name and argument(
        node, 2, "train" if isinstance(node.target, torch._ops.OpOverload) else "training", True
    )
    if random or not is_tensor(value) or not value.is_floating_point():
        raise Opaque
    source = walk.shapes.values[node.all_input_nodes[0]]
    if value.shape != source.shape or value.dtype != source.dtype or _casts(node):
        raise Opaque
    return labels


def rectifier(walk: Walk, node: fx.Node) -> Tensor:
    """f(a x) = a f(x) for a > 0, and d = 0; with thresholds any gauge."""
    labels = walk.labels_of(argument(node, 0, "input"))
    for other in node.all_input_nodes[1:]:
        walk.found.ground(array(walk.labels_of(other)), Cause(node, describe(node)))
    name = call_name(node)
    soft = walk.options.thresholds and base_name(name) == "relu"
    if soft:
        _bounded(walk, node, labels, 0.0, np.inf)
    walk.positive(array(labels), Cause(node, describe(node)), soft=soft)
    walk.unshifted(array(labels), Cause(node, describe(node)), soft=soft)
    return labels


def clamp(walk: Walk, node: fx.Node) -> Tensor:
    """With thresholds any gauge, otherwise none."""
    if not walk.options.thresholds:
        raise Opaque
    labels, bounds = walk.labels_of(argument(node, 0, "input")), _bounds_of(node)
    if bounds is None:
        raise Opaque
    _bounded(walk, node, labels, *bounds)
    used, cause = np.unique(array(labels)), Cause(node, describe(node))
    zero = np.zeros_like(used)
    walk.found.demand(Demand.SAME_SCALE, used, zero, cause=cause, soft=True)
    walk.unshifted(used, cause, soft=True)
    return labels


def _bounded(walk: Walk, node: fx.Node, labels: Tensor, lower: float, upper: float) -> None:
    like = walk.shapes.values[node]
    walk.found.bounds.setdefault(node, Bounds(compact(labels).contiguous(), lower, upper, like))


def _bounds_of(node: fx.Node) -> tuple[float, float] | None:
    """Lower and upper bound of a clamp; None where they are computed."""
    name = base_name(call_name(node))
    lower: Any = None
    upper: Any = None
    if name == "relu6":
        lower, upper = 0.0, 6.0
    elif name == "hardtanh":
        lower, upper = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    elif name in ("clamp", "clip"):
        lower, upper = argument(node, 1, "min"), argument(node, 2, "max")
    elif name == "clamp_min":
        lower = argument(node, 1, "min")
    elif name == "clamp_max":
        upper = argument(node, 1, "max")
    if not all(bound is None or isinstance(bound, int | float) for bound in (lower, upper)):
        return None
    lower, upper = -np.inf if lower is None else lower, np.inf if upper is None else upper
    if np.isnan(lower) or np.isnan(upper):
        return None
    return min(lower, upper), upper  # where they cross, torch gives the upper one


def _casts(node: fx.Node) -> bool:
    """Whether the call names a dtype: rounding to it would come out otherwise under a gauge.

    In a copy of the model at another dtype it may round, and both copies must fold alike.
    """
    named = [*node.args, *node.kwargs.values()]
    return function_name(node.target) in ("float", "half", "bfloat16", "double") or any(
        isinstance(value, torch.dtype) for value in named
    )
