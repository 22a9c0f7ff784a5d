"""Norms and linear layers in one spelling.

Core ATen's norms give a tuple, of which the first element is the output, and its linear layers are
products with a weight that is turned, `addmm(bias, x, permute(weight, [1, 0]))`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from bnfx.graphs.parameters import attribute, sweep
from bnfx.operators.calls import arguments, call_name, signature_of
from bnfx.operators.table import Passage, operator_of

_aten = torch.ops.aten

#: node.meta key of a plain norm: overload and name of the native call, and the name of its output.
_NATIVE = "bnfx_native"
_PLAIN = (_aten.batch_norm.default, _aten.layer_norm.default, _aten.group_norm.default)
#: node.meta key of a linear layer that was a product.
_PRODUCT = "bnfx_product"


def spell_linear(module: fx.GraphModule) -> None:
    """Let products with a turned weight, and a bias for each column, be linear layers."""
    for node in list(module.graph.nodes):
        if node.target not in (_aten.mm.default, _aten.addmm.default) or node.kwargs:
            continue
        *bias, x, turned = node.args
        parts: list[Any] = [_untransposed(turned), *bias]
        if all(isinstance(part, fx.Node) and part.op == "get_attr" for part in parts):
            weight, *sums = (attribute(module, str(part.target)) for part in parts)
            if not isinstance(weight, Tensor):
                continue
            if not all(isinstance(b, Tensor) and b.shape == weight.shape[:1] for b in sums):
                continue
            node.target, node.args = _aten.linear.default, (x, *parts)
            node.meta[_PRODUCT] = True
            sweep([turned])


def _untransposed(node: Any) -> fx.Node | None:
    """The matrix of which this is the transpose."""
    turned = node.target is _aten.permute.default and list(node.args[1]) == [1, 0]
    found: Any = node.args[0] if turned or node.target is _aten.t.default else None
    return found if isinstance(found, fx.Node) else None


def spell_products(graph: fx.Graph) -> None:
    """Undo `spell_linear` for the layers that are there now."""
    for node in list(graph.nodes):
        if node.target is not _aten.linear.default or not node.meta.pop(_PRODUCT, False):
            continue
        call = arguments(node)
        with graph.inserting_before(node):
            turned = graph.call_function(_aten.permute.default, (call["weight"], [1, 0]))
        operands = (call["input"], turned)
        plain = call["bias"] is None
        node.target = _aten.mm.default if plain else _aten.addmm.default
        node.args, node.kwargs = operands if plain else (call["bias"], *operands), {}


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
        if _NATIVE not in node.meta or node.target not in _PLAIN:
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
