"""Which in-place calls may be taken for fresh results, and which values they bar from change.

`y = x.add_(1)` equals `y = x + 1` if nothing that may share memory with x is read afterwards.
Where that is not proved, everything that may share the memory keeps its values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.operators.calls import argument, base_name, call_name, function_name
from bnfx.operators.effects import writes
from bnfx.operators.table import (
    is_batch_norm,
    is_instance_norm,
    operator_of,
    reads_elements,
)


@dataclass(frozen=True)
class Aliases:
    """Nodes by the memory that they may share."""

    groups: dict[fx.Node, list[fx.Node]]  #: node -> all nodes that may share its memory
    position: dict[fx.Node, int]  #: node -> place in execution order

    def replaceable(self, node: fx.Node) -> bool:
        """Whether the in-place call `node` may give a fresh result instead."""
        target = argument(node, 0, "input")
        if not isinstance(target, fx.Node) or "out" in node.kwargs:
            return False
        at = self.position[node]
        for member in self.groups[target]:
            if member.op in ("placeholder", "get_attr", "call_module"):
                return False
            if self.position[member] >= at:
                continue
            for user in member.users:
                if user is node or self.position[user] < at:
                    continue
                if reads_elements(user, member):
                    return False
        return True


def aliases(graph: fx.Graph) -> Aliases:
    """Union of every call with those of its inputs that its result may be a view of."""
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    position: dict[fx.Node, int] = {}
    for at, node in enumerate(graph.nodes):
        position[node] = at
        parent[node] = node
        if node.op in ("placeholder", "get_attr", "output") or not _may_alias(node):
            continue
        for value in _viewed(node):
            parent[find(value)] = find(node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        groups.setdefault(find(node), []).append(node)
    return Aliases({node: groups[find(node)] for node in graph.nodes}, position)


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    if node.op != "call_module" and writes(node) and fresh_form(node) is not None:
        first = argument(node, 0, "input")  # the result is this one, changed
        if isinstance(first, fx.Node):
            yield first
            return
    for value in node.all_input_nodes:
        if reads_elements(node, value):
            yield value


def _may_alias(node: fx.Node) -> bool:
    if node.op == "call_module" or writes(node):
        return True
    row = operator_of(node)
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace != "aten":
            return True
        returned = node.target._schema.returns
        viewing = row is not None and not row.fresh
        return viewing or any(r.alias_info is not None for r in returned)
    return row is None or not row.fresh


def barred(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose values must stay: they share memory with what is written while it is read."""
    found = aliases(graph)
    kept: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and writes(node):
            if is_batch_norm(node) or is_instance_norm(node):
                continue
            if not (fresh_form(node) is not None and found.replaceable(node)):
                kept.update(found.groups[node])
                for value in node.all_input_nodes:
                    kept.update(found.groups[value])
    return frozenset(kept)


def fresh_form(node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """Target and keywords of the call that gives a fresh result; None if there is none."""
    kwargs = dict(node.kwargs)
    if kwargs.pop("inplace", False):
        return node.target, kwargs
    name = call_name(node)
    if name.startswith("i") and getattr(operator, name, None) is node.target:
        plain = name[1:]  # iadd -> add, iand -> and_
        return getattr(operator, plain, None) or getattr(operator, f"{plain}_"), kwargs
    if isinstance(node.target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, base_name(function_name(node.target)), None)
        overload = node.target._overloadname
        if packet is None or overload not in packet.overloads():
            return None
        return getattr(packet, overload), kwargs
    if base_name(name) == name:
        return None
    if node.op == "call_method":
        return base_name(name), kwargs
    for space in (torch, F):
        if getattr(space, name, None) is node.target:
            return getattr(space, base_name(name), None), kwargs
    return None


def freshen(graph: fx.Graph, kept: frozenset[fx.Node]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Replace in-place calls by fresh ones except in `kept`. What they were, by node name."""
    old: dict[str, tuple[Any, dict[str, Any]]] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or not writes(node) or node in kept:
            continue
        form = fresh_form(node)
        if form is None or form[0] is None:
            continue
        old[node.name] = (node.target, dict(node.kwargs))
        node.target, node.kwargs = form
    return old


def restore(graph: fx.Graph, old: dict[str, tuple[Any, dict[str, Any]]]) -> list[fx.Node]:
    """Make calls in-place again where that is safe in the graph as it is now; those left fresh."""
    found, left = aliases(graph), []
    for node in graph.nodes:
        if node.name not in old:
            continue
        if not found.replaceable(node):
            left.append(node)
            continue
        node.target, kwargs = old[node.name]
        node.kwargs = kwargs | {k: v for k, v in node.kwargs.items() if k != "inplace"}
    return left
