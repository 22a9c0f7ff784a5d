"""What an inference graph computes from its parameters alone: constants, evaluated on demand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from bnfx.graphs.parameters import Constants
from bnfx.operators.calls import call_name, function_name
from bnfx.operators.effects import overwrites, writes
from bnfx.operators.table import operator_of, reads_elements


class Values:
    """Values of nodes that depend on nothing but parameters and buffers that nobody writes."""

    def __init__(self, graph: fx.Graph, known: Constants) -> None:
        self.known = known  #: the tensors that the graph reads by name
        self._constant: set[fx.Node] = set()
        self._memory: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if self._follows(node):
                self._constant.add(node)

    def _follows(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return self.known.value(node) is not None
        if _is_filled(node):
            return not any(overwrites(user, node) for user in node.users)
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            return False
        if not all(n in self._constant for n in node.all_input_nodes):
            return False
        return is_pure(node) and not any(overwrites(user, node) for user in node.users)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether `node` has one value, whatever the inputs are."""
        return node in self._constant

    def of(self, value: object) -> Tensor | None:
        """The tensor that `value` always is, in its own dtype; None if it is not constant."""
        if not isinstance(value, fx.Node) or value not in self._constant:
            return None
        found = self._evaluate(value)
        return found if isinstance(found, Tensor) else None

    def widened(self) -> Values:
        """The same, computed in float64 from the start."""
        wide = copy.copy(self)
        wide._memory = {}
        wide.known = replace(self.known, tensors=_Widened(self.known.tensors))
        return wide

    def operand(self, value: object) -> Tensor | None:
        """A constant operand of an elementwise call in float64; None if it is not constant."""
        if isinstance(value, bool) or not isinstance(value, int | float | fx.Node):
            return None
        if isinstance(value, int | float):
            return torch.tensor(float(value), dtype=torch.float64, device="cpu")
        known = self.of(value)
        if known is None or known.is_complex() or known.dtype is torch.bool:
            return None
        return known.detach().double().cpu()

    def sources(self, value: object) -> tuple[str, ...]:
        """Names of the parameters and buffers that a constant is computed from."""
        if not isinstance(value, fx.Node) or value not in self._constant:
            return ()
        if value.op == "get_attr":
            return (str(value.target),)
        names = (name for n in value.all_input_nodes for name in self.sources(n))
        return tuple(dict.fromkeys(names))

    def _evaluate(self, node: fx.Node) -> Any:
        if node in self._memory:
            return self._memory[node]
        if node.op == "get_attr":
            return self.known.tensors[str(node.target)]
        kwargs = dict(node.kwargs)
        if _is_filled(node):
            kwargs = {k: v for k, v in kwargs.items() if not isinstance(v, fx.Node)}
        args, kwargs = fx.map_arg((node.args, kwargs), self._evaluate)
        with torch.no_grad():
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]  # a function
        self._memory[node] = value
        return value


class _Widened(dict[str, Tensor]):
    """Tensors in float64 where they are rounded to less, one by one as they are asked for."""

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        return value.double() if value.is_floating_point() else value


def _is_filled(node: fx.Node) -> bool:
    """Whether a call makes zeros or ones, of the dtype and on the device of something at most."""
    if node.op != "call_function" or call_name(node) not in ("zeros", "ones"):
        return False
    asked = [value for value in node.kwargs.values() if isinstance(value, fx.Node)]
    known = all(v.target is getattr and v.args[1] in ("dtype", "device") for v in asked)
    return known and is_torch(node.target) and len(asked) == len(node.all_input_nodes)


def is_pure(node: fx.Node) -> bool:
    """Whether a call gives the same result each time and does nothing else."""
    if node.op not in ("call_function", "call_method") or writes(node):
        return False
    row = operator_of(node)
    if row is not None:
        return row.pure
    return node.op == "call_method" or is_torch(node.target)


def is_torch(target: Any) -> bool:
    """Whether a function is one of torch's own or of Python's."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    module = getattr(target, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "_operator", "math", "builtins") or (
        getattr(torch, function_name(target), None) is target
    )


def readers(value: fx.Node) -> list[fx.Node]:
    """The users of `value` that depend on its elements."""
    return [user for user in value.users if reads_elements(user, value)]
