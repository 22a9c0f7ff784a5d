"""Nodes of a graph in a user's words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import fx

from bnfx.numbers import Ints
from bnfx.operators.calls import arguments, call_name
from bnfx.operators.table import affine_of, is_batch_norm, is_instance_norm, layer_call

#: node.meta key: module path of the BatchNorm module behind a functional call.
OWNER = "bnfx_owner"

_SHOWN = 6


def describe(value: object) -> str:
    """A node by its kind and by the path of the layer where it has one."""
    if not isinstance(value, fx.Node):
        return repr(value)
    row = affine_of(value)
    if row is not None:
        weight = layer_call(value)["weight"]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return f"{row.kind} {owner_of(str(weight.target))!r}"
        return f"{row.kind} {path_of(value)!r}"
    if is_batch_norm(value) or is_instance_norm(value):
        return f"BatchNorm {norm_path(value)!r}"
    if value.op == "call_module":
        return f"module {value.target!r}"
    if value.op == "placeholder":
        return f"input {value.name!r}"
    if value.op == "output":
        return "output of the network"
    name = call_name(value)
    return f"{name} {path_of(value)!r}"


def norm_path(node: fx.Node) -> str:
    """Name of a norm's evaluation: its module, or the owner of its running mean, or the node."""
    if OWNER in node.meta:
        return str(node.meta[OWNER])
    known = is_batch_norm(node) or is_instance_norm(node)
    mean = arguments(node)["running_mean"] if known else None
    if isinstance(mean, fx.Node) and mean.op == "get_attr":
        return owner_of(str(mean.target))
    return path_of(node)


def owner_of(name: str) -> str:
    """Path of the module that holds a parameter; the parameter's own name at the root."""
    return name.rpartition(".")[0] or name


def path_of(node: fx.Node) -> str:
    """Path of the module in whose forward the call stands, or the node's own name at the root."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        cleaned = str(path).removeprefix("L['self'].").removeprefix("L__self___")
        if cleaned and cleaned != "L['self']":
            return cleaned
    return node.name


def listed(nodes: Iterable[fx.Node]) -> str:
    """Descriptions with commas."""
    return ", ".join(describe(node) for node in nodes)


def channels(which: Ints) -> str:
    """[0, 1, 2, 7] -> "channels 0-2, 7"."""
    if not len(which):
        return "no channels"
    runs = np.split(which, np.flatnonzero(np.diff(which) != 1) + 1)
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:_SHOWN]]
    more = f" and {len(runs) - _SHOWN} more ranges" if len(runs) > _SHOWN else ""
    return f"channel{'s' if len(which) > 1 else ''} {', '.join(parts)}{more}"
