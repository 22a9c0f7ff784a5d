"""Rules of operators over axes: pooling, interpolation, sums, padding, products of matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bnfx.gauges.constraints import Cause, Kind, Site
from bnfx.gauges.labels import along, array, compact, ground_map, settled
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.graphs.shapes import is_tensor
from bnfx.operators.calls import all_equal, argument, base_name, call_name
from bnfx.operators.products import Product, products
from bnfx.operators.table import Passage, layer_call, passage_of


def pool(walk: Walk, node: fx.Node) -> Any:
    """One gauge for each channel; a > 0 under a maximum, d = 0 where padded zeros are counted."""
    value = argument(node, 0, "input")
    labels, name = walk.labels_of(value), base_name(call_name(node))
    spatial = int(next(c for c in name if c.isdigit()))
    axis = labels.dim() - 1 - spatial
    cause = Cause(node, describe(node))
    channels = walk.channels(labels, axis, cause)
    if passage_of(node) is Passage.MAX_POOL:
        walk.positive(channels, cause)
    elif not name.startswith("adaptive") and counts_padding(node):
        walk.unshifted(channels, Cause(node, f"the counted zero padding of {describe(node)}"))
    out = walk.shapes.values[node]
    if isinstance(out, tuple | list):
        return (along(channels, axis, out[0].shape), ground_map(out[1].shape))
    return along(channels, axis, walk.shape_of(node))


def interpolate(walk: Walk, node: fx.Node) -> Tensor:
    """One gauge for each channel."""
    labels = walk.labels_of(argument(node, 0, "input"))
    channels = walk.channels(labels, 1, Cause(node, describe(node)))
    return along(channels, 1, walk.shape_of(node))


def reduce(walk: Walk, node: fx.Node) -> Tensor:
    """One gauge for each place that stays; d = 0 under a sum."""
    labels = walk.labels_of(argument(node, 0, "input"))
    reduced = reduced_axes(node, labels.dim())
    cause = Cause(node, describe(node))
    kept = [axis for axis in range(labels.dim()) if axis not in reduced]
    small = compact(labels)
    kept_shape = [small.shape[axis] for axis in kept]
    rows = walk.rows(small, kept, cause)
    if passage_of(node) is Passage.SUM:
        walk.unshifted(rows, Cause(node, f"the sum {describe(node)}"))
    shape = walk.shape_of(node)
    view = (
        [small.shape[axis] if axis in kept else 1 for axis in range(labels.dim())]
        if len(shape) == labels.dim()
        else kept_shape
    )
    return torch.from_numpy(rows).reshape(view).expand(shape)


def reduced_axes(node: fx.Node, rank: int) -> set[int]:
    """The axes that a mean or a sum over `rank` of them takes away; all where none are named."""
    dims = argument(node, 1, "dim")
    if dims is None or dims == () or dims == [] or isinstance(dims, fx.Node):
        dims = tuple(range(rank))
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    if not all(isinstance(d, int) for d in dims) or not rank:
        raise Opaque
    return {d % rank for d in dims}


def pad(walk: Walk, node: fx.Node) -> Tensor:
    """Equal gauges; d = 0 where zeros come in. Negative widths crop, and bring nothing in."""
    labels = walk.labels_of(argument(node, 0, "input"))
    widths, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    fill = argument(node, 3, "value")
    if isinstance(node.target, torch._ops.OpOverload):
        mode, fill = ("constant", mode) if call_name(node) != "pad" else (mode, fill)
        fill = None if fill == "constant" else fill
    axes = padded_axes(node, labels.dim())
    filled = mode == "constant" and any(w > 0 for w in widths)
    if filled and fill not in (None, 0):
        raise Opaque
    small, shape = compact(settled(labels)), walk.shape_of(node)
    if any(small.shape[axis] > 1 for axis in axes):
        if mode != "constant":
            raise Opaque
        return _pad_channels(walk, node, labels, list(widths))
    if filled:
        walk.unshifted(array(small), Cause(node, f"the zeros of {describe(node)}"))
    return small.expand([shape[i] if n == 1 else n for i, n in enumerate(small.shape)])


def padded_axes(node: fx.Node, dim: int) -> list[int]:
    """The axes of a tensor that padding or cropping moves along.

    Raises:
        Opaque: They are known only when it runs.
    """
    widths = argument(node, 1, "pad")
    if not isinstance(widths, tuple | list) or not all(isinstance(w, int) for w in widths):
        raise Opaque
    return [dim - 1 - i // 2 for i, w in enumerate(widths) if w]


def _pad_channels(walk: Walk, node: fx.Node, labels: Tensor, widths: list[int]) -> Tensor:
    """Zeros beside channels have gauges of their own."""
    padded = torch.nn.functional.pad(labels.double(), widths, value=-1.0).long()
    new = padded < 0
    small = compact(settled(torch.where(new, torch.full_like(padded, -1), padded)))
    holes = small < 0
    y = walk.found.fresh(node, "y", int(holes.sum()))
    walk.unshifted(y, Cause(node, f"the zeros of {describe(node)}"))
    filled = small.clone()
    filled[holes] = torch.from_numpy(y)
    return filled.expand(walk.shape_of(node))


def counts_padding(node: fx.Node) -> bool:
    """Whether an average pool does not keep a constant image as it is."""
    padding = argument(node, 3, "padding", 0)
    counted = argument(node, 5, "count_include_pad", True)
    return (not all_equal(padding, 0) and counted is not False) or argument(
        node, 6, "divisor_override"
    ) is not None


def matmul(walk: Walk, node: fx.Node) -> Tensor:
    """With a parameter a layer; else linear in the second operand, and the first is ground."""
    for product in products(node, _ranks(walk, node)):
        weight = walk.values.of(product.weight)
        if weight is not None and weight.is_floating_point():
            return _layer(walk, node, product, weight)
    if base_name(call_name(node)) in ("addmm", "einsum"):
        raise Opaque
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
    if any(not isinstance(walk.maps.get(n), Tensor) for n in node.all_input_nodes):
        raise Opaque
    if isinstance(node.target, torch._ops.OpOverload):
        right = argument(node, 1, "mat2" if "bmm" in str(node.target) else "other")
    weights, values = walk.labels_of(left), walk.labels_of(right)
    if values.dim() < 2 or weights.dim() < 2 or walk.values.of(right) is not None:
        raise Opaque
    cause = Cause(node, describe(node))
    walk.found.ground(array(weights), cause)
    return _contracted(walk, node, values, cause, sums_to_one=_rows_sum_to_one(walk, left))


def attention(walk: Walk, node: fx.Node) -> Tensor:
    """Linear in the values, one gauge for each feature; queries and keys are ground."""
    parts = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    mask, rate = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    cause = Cause(node, describe(node))
    for part in (*parts[:2], mask):
        if isinstance(part, fx.Node):
            walk.found.ground(array(walk.maps[part]), cause)
    if rate != 0.0:
        raise Opaque
    values = walk.labels_of(parts[2])
    # a row that is masked throughout sums to zero
    return _contracted(walk, node, values, cause, sums_to_one=mask is None)


def _ranks(walk: Walk, node: fx.Node) -> tuple[int, int]:
    """The ranks of the two factors; what is unknown is taken for a matrix."""
    call: dict[Any, Any] = layer_call(node) if base_name(call_name(node)) != "einsum" else {}
    first, second = (walk.shapes.values.get(call.get(part, node)) for part in ("input", "weight"))
    return first.dim() if is_tensor(first) else 2, second.dim() if is_tensor(second) else 2


def _layer(walk: Walk, node: fx.Node, product: Product, weight: Tensor) -> Tensor:
    """A gauge for each feature in and another out."""
    shape, bias = walk.shape_of(node), walk.values.of(product.bias)
    if product.bias is not None and (bias is None or bias.numel() not in (1, shape[-1])):
        raise Opaque
    if bias is not None and bias.dim() > 1 and bias.shape[-1] != bias.numel():
        raise Opaque
    inputs, outputs = product.sizes(weight)
    words = f"{describe(node)}, whose weights take one gauge for each channel"
    if isinstance(walk.maps.get(product.input), Tensor):
        labels = walk.labels_of(product.input)
        axes = [labels.dim() + axis for axis in product.x_axes]
        x = walk.rows(labels, axes, Cause(node, words))
        if tuple(labels.shape[axis] for axis in axes) != inputs:  # one of them is broadcast
            raise Opaque
    else:
        x = np.zeros(math.prod(inputs), np.int64)
    if tuple(shape[axis] for axis in product.y_axes) != outputs:
        raise Opaque
    y = walk.found.fresh(node, "y", math.prod(outputs))
    walk.found.absorbers.append(y)
    walk.found.readers[node, 0] = np.unique(x)
    site = Site(node, Kind.PRODUCT, x, y, source=product.input, like=weight, product=product)
    walk.found.site(site)
    return product.over_outputs(torch.from_numpy(y), weight).expand(shape)


def _contracted(
    walk: Walk, node: fx.Node, values: Tensor, cause: Cause, *, sums_to_one: bool
) -> Tensor:
    small = compact(values)
    kept = [axis for axis in range(values.dim()) if axis != values.dim() - 2]
    rows = walk.rows(small, kept, cause)
    if not sums_to_one:
        walk.unshifted(rows, cause)
    shape = walk.shape_of(node)
    view = [n if axis in kept else 1 for axis, n in enumerate(small.shape)]
    return torch.from_numpy(rows).reshape(view).expand(shape)


def _rows_sum_to_one(walk: Walk, value: object) -> bool:
    while isinstance(value, fx.Node) and passage_of(value) is Passage.IDENTITY:
        value = argument(value, 0, "input")
    if not isinstance(value, fx.Node) or passage_of(value) is not Passage.SOFTMAX:
        return False
    axis = argument(value, 1, "dim")
    return axis in (-1, len(walk.shape_of(value)) - 1)
