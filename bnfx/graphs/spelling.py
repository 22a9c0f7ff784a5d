"""Norms in one spelling: core ATen's give a tuple, of which the first element is the output."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bnfx.operators.calls import arguments, call_name
from bnfx.operators.table import Passage, operator_of

_aten = torch.ops.aten


def spell_norms(graph: fx.Graph) -> None:
    """Let the output of a native norm come from the plain one.

    The native call stays where something reads more of it than its output.
    """
    for node in list(graph.nodes):
        row = operator_of(node) if node.op == "call_function" else None
        if row is None or row.passage not in (Passage.BATCH_NORM, Passage.NORM):
            continue
        for unread in [u for u in node.users if u.target is operator.getitem and not u.users]:
            graph.erase_node(unread)
        outputs = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
        plain = _plain(node) if outputs else None
        if plain is None:
            continue
        with graph.inserting_before(node):
            made = graph.call_function(*plain)
        made.meta = {key: value for key, value in outputs[0].meta.items() if key != "val"}
        made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
        for output in outputs:
            output.replace_all_uses_with(made)
            graph.erase_node(output)
        if not node.users:
            graph.erase_node(node)


def _plain(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """Function and arguments of the plain norm; None where `node` is no native one."""
    name, call = call_name(node), arguments(node)
    if name == "native_layer_norm":
        shape = (call["input"], call["normalized_shape"])
        return _aten.layer_norm.default, (*shape, call["weight"], call["bias"], call["eps"])
    if name == "native_group_norm":
        groups = (call["input"], call["group"])
        return _aten.group_norm.default, (*groups, call["weight"], call["bias"], call["eps"])
    if "batch_norm" not in name or name == "batch_norm" or "with_update" in name:
        return None
    eps = call.get("epsilon", call["eps"])  # cuDNN and MIOpen have names of their own
    momentum = call.get("momentum", call.get("exponential_average_factor", 0.0))
    state = (call["weight"], call["bias"], call["running_mean"], call["running_var"])
    options = (call["training"], momentum, eps, False)
    return _aten.batch_norm.default, (call["input"], *state, *options)
