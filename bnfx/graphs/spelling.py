"""Norms in one spelling: core ATen's give a tuple, of which the first element is the output."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bnfx.operators.calls import arguments, call_name, signature_of
from bnfx.operators.table import Passage, operator_of

_aten = torch.ops.aten

#: node.meta key of a plain norm: overload and name of the native call, and the name of its output.
_NATIVE = "bnfx_native"


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
        made.meta = dict(outputs[0].meta)
        made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
        made.meta[_NATIVE] = (node.target, node.name, outputs[0].name)
        for output in outputs:
            output.replace_all_uses_with(made)
            graph.erase_node(output)
        if not node.users:
            graph.erase_node(node)


def spell_natively(graph: fx.Graph) -> None:
    """Undo `spell_norms` for the norms that are still there; the graph knows their sizes."""
    for node in list(graph.nodes):
        if _NATIVE not in node.meta:
            continue
        target, name, output_name = node.meta.pop(_NATIVE)
        call = arguments(node)
        with graph.inserting_before(node):
            known = _natively(graph, call) if "N" in signature_of(target) else _natively_named(call)
            values = tuple(known[argument] for argument in signature_of(target))
            native = graph.create_node("call_function", target, values, name=name)
            output = graph.create_node(
                "call_function", operator.getitem, (native, 0), name=output_name
            )
        native.meta = {key: value for key, value in node.meta.items() if key != "val"}
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output)
        graph.erase_node(node)


def _natively_named(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a plain norm, also under the names that cuDNN and MIOpen have for them."""
    others = {"epsilon": call["eps"], "exponential_average_factor": call.get("momentum")}
    return call | others


def _natively(graph: fx.Graph, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a plain group norm; the native one takes the sizes of its input too."""
    x = call["input"]
    sizes: list[Any] = [
        n if isinstance(n, int) else graph.call_function(_aten.sym_size.int, (x, axis))
        for axis, n in enumerate(x.meta["val"].shape)
    ]
    space: Any = 1
    for size in sizes[2:]:
        both = isinstance(space, int) and isinstance(size, int)
        space = space * size if both else graph.call_function(operator.mul, (space, size))
    return call | {"N": sizes[0], "C": sizes[1], "HxW": space, "group": call["num_groups"]}


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
    if "functional" in name and call["training"] is not False:
        return None  # it returns what the plain one writes
    eps = call.get("epsilon", call["eps"])  # cuDNN and MIOpen have names of their own
    momentum = call.get("momentum", call.get("exponential_average_factor", 0.0))
    state = (call["weight"], call["bias"], call["running_mean"], call["running_var"])
    options = (call["training"], momentum, eps, False)
    return _aten.batch_norm.default, (call["input"], *state, *options)
