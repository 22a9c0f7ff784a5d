"""Parts that run with or without gradients: to an inference graph they are as all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bnfx.graphs.parameters import attribute, free_name, set_tensor

_WITH_MODE: Any = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_grad_modes(module: fx.GraphModule) -> None:
    """Put the calls of parts that torch.export keeps whole for their gradient mode into the graph.

    Their BatchNorms fold with what is around them then, as they do where symbolic tracing saw the
    model, which knows no such parts.
    """
    while calls := module.graph.find_nodes(op="call_function", target=_WITH_MODE):
        _inline(module, calls[0])
    module.recompile()


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    part: Any = call.args[1]
    inner = module.get_submodule(part.target)
    assert isinstance(inner, fx.GraphModule)
    values: dict[fx.Node, Any] = dict(
        zip(inner.graph.find_nodes(op="placeholder"), call.args[2:], strict=True)
    )
    results: Any = None
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], values.__getitem__)
            elif node.op != "placeholder":
                values[node] = module.graph.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                values[node].target = _moved(module, inner, part.target, str(node.target))
    for user in list(call.users):  # each takes one of the results
        index: Any = user.args[1]
        user.replace_all_uses_with(results[index])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
    if not part.users:
        module.graph.erase_node(part)
        module.delete_submodule(part.target)


def _moved(module: fx.GraphModule, inner: fx.GraphModule, path: str, name: str) -> str:
    """A name in `module` for what `inner`, at `path`, holds under `name`."""
    value, free = attribute(inner, name), free_name(module, f"{path}_{name}".replace(".", "_"))
    if isinstance(value, Tensor):
        trained = isinstance(value, torch.nn.Parameter)
        set_tensor(module, free, value, trained=value.requires_grad, buffer=not trained)
    else:
        assert isinstance(value, torch.nn.Module)
        module.add_module(free, value)
    return free
