"""The nodes of a graph as the boxes of a picture."""

from __future__ import annotations

from torch import fx

from bnfx.graphs.naming import norm_path, owner_of
from bnfx.operators.calls import function_name
from bnfx.operators.table import affine_of, is_batch_norm, layer_call
from bnfx.reports.graph_pictures import Box


def boxes(module: fx.GraphModule) -> tuple[Box, ...]:
    """The nodes that carry data, in order."""
    return tuple(
        Box(
            node.name,
            *_kind_and_layer(node, module),
            inputs=tuple(n.name for n in node.all_input_nodes if n.op != "get_attr"),
            mark="norm" if is_batch_norm(node) else "",
        )
        for node in module.graph.nodes
        if node.op not in ("get_attr", "output")
    )


def _kind_and_layer(node: fx.Node, module: fx.GraphModule) -> tuple[str, str]:
    if node.op == "placeholder":
        return "input", str(node.target)
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__, str(node.target)
    if is_batch_norm(node):
        return "BatchNorm", norm_path(node)
    row = affine_of(node)
    if row is not None:
        weight = layer_call(node)["weight"]
        known = isinstance(weight, fx.Node) and weight.op == "get_attr"
        return row.kind, owner_of(str(weight.target)) if known else ""
    kind = node.target if node.op == "call_method" else function_name(node.target)
    return str(kind), ""
