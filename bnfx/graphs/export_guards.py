"""What torch.export assumed of its inputs, as a graph: its own module for that takes no pickle."""

from __future__ import annotations

import functools
import inspect
import re
import types
from typing import Any

import torch
from torch import fx

#: The module of the exporter that checks its assumptions, and the start of what it says.
GUARDS, _FAILED = "_guards_fn", "Guard failed: "
#: The functions that a condition may call.
_KNOWN = frozenset({"size", "max", "min"})


class _Condition(fx.Proxy):
    """One of several conditions that all must hold: `a and b`, `a <= b <= c`."""

    def __bool__(self) -> bool:
        _assert(self, f"{_FAILED}a size for which this graph was not made")
        return True


class _GuardTracer(fx.proxy.GraphAppendingTracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value that the conditions look at."""
        return _Condition(node, self)

    def largest(self, *values: Any) -> Any:
        """`max`, which would ask which value is larger."""
        return functools.reduce(functools.partial(self._of_two, torch.sym_max), values)

    def smallest(self, *values: Any) -> Any:
        """`min`, likewise."""
        return functools.reduce(functools.partial(self._of_two, torch.sym_min), values)

    def _of_two(self, function: Any, a: Any, b: Any) -> Any:
        return self.create_proxy("call_function", function, (a, b), {})


_assert: Any = torch._assert


def rewrite_guards(captured: fx.GraphModule) -> None:
    """Make the module in which the result of torch.export checks its inputs a GraphModule.

    Conditions of which one is enough (`a or b`), which no graph shows, stay as they are.
    """
    call = next((node for node in captured.graph.nodes if node.target == GUARDS), None)
    check = _check_of(captured.get_submodule(GUARDS).forward) if call is not None else None
    if call is None or check is None:
        return
    if not all(_conjunction(text) for text in check.__code__.co_consts if _says(text)):
        return
    graph = fx.Graph()
    tracer = _GuardTracer(graph)
    inputs = [tracer.proxy(graph.placeholder(f"input_{i}")) for i in range(len(call.args))]
    names = {"max": tracer.largest, "min": tracer.smallest}
    try:
        types.FunctionType(check.__code__, {**check.__globals__, **names})(*inputs)
    except (fx.proxy.TraceError, TypeError):
        return
    graph.output(None)
    guards: Any = fx.GraphModule({}, graph, class_name="Guards")
    guards._is_impure = True  # its call has no reader, and stays
    captured.add_module(GUARDS, guards)


def _check_of(forward: Any) -> types.FunctionType | None:
    """The function that checks, which torch writes as `def _(*args)` and wraps in another."""
    wrapped = inspect.getclosurevars(forward).nonlocals.values()
    found = [f for f in (forward, *wrapped) if isinstance(f, types.FunctionType)]
    return next((f for f in found if f.__name__ == "_"), None)


def _says(text: object) -> bool:
    return isinstance(text, str) and text.startswith(_FAILED)


def _conjunction(text: str) -> bool:
    """Whether a condition, in words, is made of comparisons that must all hold."""
    condition = text.removeprefix(_FAILED)
    called = set(re.findall(r"(\w+)\(", condition))
    return called <= _KNOWN and not re.search(r"\b(or|not|if)\b", condition)
