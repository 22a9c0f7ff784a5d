"""Rules of layers: what a convolution, a BatchNorm and a norm demand of their gauges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bnfx.gauges.constraints import Cause, Kind, Site
from bnfx.gauges.labels import along
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.graphs.norms import affine_map_of, norm_call
from bnfx.operators.calls import all_equal, argument, base_name, call_name
from bnfx.operators.table import Operator, affine_of, layer_call


def affine(walk: Walk, node: fx.Node) -> Tensor:
    """A gauge for each channel in and another out; d = 0 in where zeros are padded."""
    row = affine_of(node)
    assert row is not None
    call = layer_call(node)
    weight, bias = walk.values.of(call["weight"]), walk.values.of(call["bias"])
    unknown = weight is None or (call["bias"] is not None and bias is None)
    if unknown or weight is None or not weight.is_floating_point():
        raise Opaque
    if weight.dim() != 2 + (row.spatial or 0):  # a linear layer takes a vector as its weight too
        raise Opaque
    shape = walk.shape_of(node)
    groups = int(call["groups"])
    size: tuple[int, ...] = ()
    outputs = weight.shape[1] * groups if row.transposed else weight.shape[0]
    if bias is not None and bias.shape != (outputs,):  # a linear layer takes any that broadcasts
        raise Opaque
    inputs = weight.shape[0] if row.transposed else weight.shape[1] * groups
    axis = len(shape) - 1 - (row.spatial or 0)
    source = walk.maps.get(call["input"])
    if not isinstance(source, Tensor):
        x = np.zeros(inputs, np.int64)
    else:
        cause = Cause(node, f"{describe(node)}, whose weights take one gauge for each channel")
        x = walk.channels(walk.labels_of(call["input"]), axis, cause)
    if len(x) != inputs or shape[axis] != outputs:
        raise Opaque
    if pads_with_zeros(row, call, weight):
        soft = walk.options.border_maps and not row.transposed and isinstance(source, Tensor)
        walk.unshifted(x, Cause(node, f"the zero padding of {describe(node)}"), soft=soft)
        if soft and isinstance(source, Tensor):
            size = tuple(int(n) for n in source.shape[axis + 1 :])
    y = walk.found.fresh(node, "y", outputs)
    walk.found.absorbers.append(y)
    walk.found.readers[node, 0] = np.unique(x)
    walk.found.site(Site(node, Kind.AFFINE, x, y, source=call["input"], like=weight, size=size))
    return along(y, axis, shape)


def batch_norm(walk: Walk, node: fx.Node) -> Tensor:
    """A gauge for each channel in and another out."""
    known = affine_map_of(node, walk.values)
    shape = walk.shape_of(node)
    if isinstance(known, str) or len(shape) < 2 or shape[1] != len(known.s):
        raise Opaque
    source = argument(node, 0, "input")
    cause = Cause(node, f"{describe(node)}, which takes one gauge for each channel of axis 1")
    if isinstance(walk.maps.get(source), Tensor):
        x = walk.channels(walk.labels_of(source), 1, cause)
    else:
        x = np.zeros(len(known.s), np.int64)
    if len(x) != len(known.s):
        raise Opaque
    y = walk.found.fresh(node, "y", len(known.s))
    walk.found.readers[node, 0] = np.unique(x)
    walk.found.site(
        Site(
            node=node,
            kind=Kind.BATCH_NORM,
            x=x,
            y=y,
            s=known.s,
            t=known.t,
            mean=known.mean,
            std=known.std,
            source=source,
            like=walk.values.of(norm_call(node)["running_mean"]),
        )
    )
    return along(y, 1, shape)


def norm(walk: Walk, node: fx.Node) -> Tensor:
    """Nothing in, a gauge for each element of the affine map out."""
    weight, bias = walk.values.of(argument(node, 2, "weight")), argument(node, 3, "bias")
    if weight is None or (bias is not None and walk.values.of(bias) is None):
        raise Opaque
    walk.ground_inputs(node, describe(node))
    shape = walk.shape_of(node)
    y = walk.found.fresh(node, "y", weight.numel())
    walk.found.absorbers.append(y)
    walk.found.site(Site(node, Kind.NORM, np.zeros_like(y), y, like=weight))
    if base_name(call_name(node)) == "group_norm":
        return along(y, 1, shape)
    return torch.from_numpy(y).reshape(weight.shape).expand(shape)


def pads_with_zeros(row: Operator, call: dict[str, Any], weight: Tensor) -> bool:
    """Whether the layer maps a constant image to something that is not constant."""
    if row.spatial is None:
        return False
    kernel = weight.shape[2:]
    if row.transposed:
        return any(k != 1 for k in kernel) or not (
            all_equal(call["stride"], 1)
            and all_equal(call["padding"], 0)
            and all_equal(call["output_padding"], 0)
        )
    padding = call["padding"]
    if padding == "valid":
        return False
    if padding == "same":
        return any(k != 1 for k in kernel)
    return not all_equal(padding, 0)
