"""Which in-place calls may be taken for fresh results, and which values they bar from change.

`y = x.add_(1)` equals `y = x + 1` if nothing that may share memory with x is read afterwards.
Where that is not proved, everything that may share the memory keeps its values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.graphs.constants import reads_elements
from bnfx.operators.calls import argument, base_name, call_name, function_name, words
from bnfx.operators.effects import writes
from bnfx.operators.layers import BATCH_NORM, INSTANCE_NORM, affine_of
from bnfx.operators.passages import Passage, passage_of

_MAY_ALIAS = (Passage.MOVE, Passage.IDENTITY, Passage.PAD, Passage.INTERPOLATE, None)
_FRESH_NAMES = words(
    "gelu silu sigmoid tanh hardswish hardsigmoid hardtanh relu6 elu selu celu mish softplus "
    "softmax exp log sqrt rsqrt pow square abs neg sin cos erf clamp clone log_softmax "
    "logsigmoid softsign bmm matmul linalg_vector_norm norm"
)

_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


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
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace != "aten":
            return True
        returned = node.target._schema.returns
        name = base_name(function_name(node.target))
        moves = passage_of(node) in (Passage.MOVE, Passage.IDENTITY)
        return moves or name == "getitem" or any(r.alias_info is not None for r in returned)
    if affine_of(node, {}) or node.target in BATCH_NORM or node.target in INSTANCE_NORM:
        return False
    name = call_name(node)
    if passage_of(node) not in _MAY_ALIAS:
        return False
    return not (passage_of(node) is None and name in _FRESH_NAMES)


def barred(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose values must stay: they share memory with what is written while it is read."""
    found = aliases(graph)
    kept: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and writes(node):
            if node.target in BATCH_NORM or node.target in INSTANCE_NORM:
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
    if node.target in _OPERATORS:
        return _OPERATORS[node.target], kwargs
    if isinstance(node.target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, base_name(function_name(node.target)), None)
        overload = node.target._overloadname
        if packet is None or overload not in packet.overloads():
            return None
        return getattr(packet, overload), kwargs
    name = call_name(node)
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


def restore(graph: fx.Graph, old: dict[str, tuple[Any, dict[str, Any]]]) -> None:
    """Make calls in-place again where that is safe in the graph as it is now."""
    found = aliases(graph)
    for node in graph.nodes:
        if node.name in old and found.replaceable(node):
            node.target, kwargs = old[node.name]
            node.kwargs = kwargs | {k: v for k, v in node.kwargs.items() if k != "inplace"}
