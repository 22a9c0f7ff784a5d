"""Labels through an inference graph: one rule for each passage of the operator table.

The rules are those of a gauge x' = a (x + d). An operator without a rule, and one whose arguments
do not fit its rule, lets nothing through: its inputs and outputs are ground.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnfx.gauges import (
    rules_axes,
    rules_elements,
    rules_layers,
    rules_sums,
)
from bnfx.gauges.constraints import Cause
from bnfx.gauges.labels import array
from bnfx.gauges.walk import Opaque, Walk
from bnfx.graphs.naming import describe
from bnfx.graphs.shapes import UNKNOWN
from bnfx.numbers import Ints
from bnfx.operators.table import Passage, passage_of, reads_elements

#: A rule gives the labels of what a call returns and writes its demands, or raises `Opaque`.
Rule = Callable[[Walk, fx.Node], Any]

RULES: dict[Passage, Rule] = {
    Passage.AFFINE: rules_layers.affine,
    Passage.BATCH_NORM: rules_layers.batch_norm,
    Passage.NORM: rules_layers.norm,
    Passage.MOVE: rules_elements.move,
    Passage.IDENTITY: rules_elements.identity,
    Passage.SHAPE: rules_elements.shape,
    Passage.RECTIFIER: rules_elements.rectifier,
    Passage.MAX_POOL: rules_axes.pool,
    Passage.AVERAGE_POOL: rules_axes.pool,
    Passage.INTERPOLATE: rules_axes.interpolate,
    Passage.MEAN: rules_axes.reduce,
    Passage.SUM: rules_axes.reduce,
    Passage.PAD: rules_axes.pad,
    Passage.CONCAT: rules_elements.concatenate,
    Passage.STACK: rules_elements.stack,
    Passage.ADD: rules_sums.add,
    Passage.SUBTRACT: rules_sums.add,
    Passage.NEGATE: rules_sums.negate,
    Passage.MULTIPLY: rules_sums.multiply,
    Passage.DIVIDE: rules_sums.multiply,
    Passage.MATMUL: rules_axes.matmul,
    Passage.ATTENTION: rules_axes.attention,
    Passage.EXTREMUM: rules_sums.extremum,
    Passage.CLAMP: rules_elements.clamp,
}

#: What may be read of these although the shapes of their inputs are unknown.
_BY_PARAMETERS = (Passage.SHAPE, Passage.AFFINE, Passage.BATCH_NORM, Passage.MATMUL)


def propagate(walk: Walk) -> None:
    """Visit every node in order; the demands are in `walk.found` then."""
    for node in walk.graph.nodes:
        if node.op == "placeholder" or any(
            n in walk.data and reads_elements(node, n) for n in node.all_input_nodes
        ):
            walk.data.add(node)
        if node.op in ("placeholder", "get_attr"):
            walk.maps[node] = walk.grounded(node)
        elif node.op == "output":
            walk.ground_inputs(node, "graph output")
        else:
            walk.maps[node] = _visit(walk, node)
        if node in walk.barred:
            _bar(walk, node)
        if node in walk.watched:
            walk.found.watched += [(node, np.unique(labels)) for labels in _labels(walk, node)]


def _visit(walk: Walk, node: fx.Node) -> Any:
    if walk.values.is_constant(node) or node not in walk.data:
        return walk.grounded(node)
    found = walk.found
    before = len(found.batches)
    try:
        return _rule(walk, node)(walk, node)
    except Opaque:
        del found.batches[before:]
        if node in found.sites:  # it had gauges at another input size
            for labels in (found.sites[node].x, found.sites[node].y):
                found.ground(labels, Cause(node, describe(node)))
        walk.ground_inputs(node, describe(node))
        return walk.grounded(node)


def _rule(walk: Walk, node: fx.Node) -> Rule:
    passage = passage_of(node)
    if passage not in RULES:
        raise Opaque
    if passage not in _BY_PARAMETERS and any(
        walk.shapes.values.get(n) is UNKNOWN for n in node.all_input_nodes
    ):
        raise Opaque
    return RULES[passage]


def _bar(walk: Walk, node: fx.Node) -> None:
    cause = Cause(node, walk.barred[node])
    for labels in _labels(walk, node):
        walk.found.ground(labels, cause)


def _labels(walk: Walk, node: fx.Node) -> Iterator[Ints]:
    """Those of each tensor that a node gives."""
    for leaf in pytree.tree_leaves(walk.maps.get(node)):
        if isinstance(leaf, Tensor):
            yield array(leaf)
