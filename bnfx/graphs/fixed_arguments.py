"""Arguments that are None or numbers, which files have no inputs for: fixed in the graph."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from bnfx.graphs.examples import Example
from bnfx.graphs.tracing import NO_PROXY, assemble
from bnfx.reports.report import remember
from bnfx.reports.report import report as report_of


def without_numbers(
    model: nn.Module, example: Example, dynamic_shapes: Any
) -> tuple[dict[str, Any], Example, dict[str, Any]]:
    """Arguments that are None or numbers, the others, and options of the export for these.

    A file has no input for a number, and the exporter names no axes beside one.
    """
    bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs).arguments
    numbers = {name: value for name, value in bound.items() if isinstance(value, NO_PROXY)}
    if not numbers:
        return {}, example, {}
    positional = list(bound)[: len(example.args)]
    stays = [name not in numbers for name in positional]
    args = tuple(itertools.compress(example.args, stays))
    kwargs = {name: value for name, value in example.kwargs.items() if name not in numbers}
    if isinstance(dynamic_shapes, Mapping):
        shapes: Any = {k: v for k, v in dynamic_shapes.items() if k not in numbers}
    elif isinstance(dynamic_shapes, tuple | list):
        shapes = tuple(itertools.compress(dynamic_shapes, stays))
    else:
        shapes = dynamic_shapes
    return numbers, Example(args, kwargs), {"kwargs": kwargs, "dynamic_shapes": shapes}


def with_numbers(folded: fx.GraphModule, numbers: Mapping[str, Any]) -> fx.GraphModule:
    """The graph with these arguments fixed; it shares its weights with `folded`."""
    if not numbers:
        return folded
    graph = copy.deepcopy(folded.graph)
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.target in numbers]:
        value = numbers[str(node.target)]

        def fixed(arg: Any, node: fx.Node = node, value: Any = value) -> Any:
            return value if arg is node else arg

        for user in list(node.users):
            user.args = fx.node.map_aggregate(user.args, fixed)
            user.kwargs = fx.node.map_aggregate(user.kwargs, fixed)
        graph.erase_node(node)
    return remember(assemble(folded, graph), report_of(folded))
