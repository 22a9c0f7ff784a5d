"""Rules of matrix products and attention: linear in their last operand."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bnfx.gauges.constraints import Cause
from bnfx.gauges.labels import array, compact
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.operators.calls import argument
from bnfx.operators.table import Passage, passage_of


def matmul(walk: Walk, node: fx.Node) -> Tensor:
    """Linear in the second operand, one gauge for each feature; the first is ground."""
    left, right = argument(node, 0, "input"), argument(node, 1, "other")
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
