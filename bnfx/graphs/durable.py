"""Graphs that stay what they are when they are copied, pickled and read again.

`torch.fx.GraphModule` loses the hooks of its root in both. A pickle holds its code, which is traced
again to read it, and that takes every tensor but parameters for a constant, and `y += 1` for
`y = y + 1`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

from torch import fx

from bnfx.graphs.proxies import TensorProxy


class _Reader(fx.Tracer):
    """Reads the code of a graph: every tensor is read by its name when the graph runs."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value under tracing."""
        return TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """A proxy is no tensor to hold."""
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)


class DurableGraph(fx.GraphModule):
    """A `torch.fx.GraphModule` that is copied and pickled with all that it holds."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = self._blank(type(self).__name__)
        memo[id(self)] = made
        return made._filled(copy.deepcopy(self.__dict__, memo))

    def __copy__(self) -> Self:
        state = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(self).items()}
        graph = copy.deepcopy(self.graph)
        return self._blank(type(self).__name__)._filled(state | {"_graph": graph})

    def __reduce__(self) -> tuple[Any, ...]:
        read, (state, imports) = super().__reduce__()
        return _read, (self._kind(), type(self).__name__, read, state, imports)

    @classmethod
    def _kind(cls) -> type[Self]:
        """The class that this was made of: torch.fx gives every graph a class of its own."""
        return next(kind for kind in cls.__mro__ if kind.__module__ != fx.graph_module.__name__)

    @classmethod
    def _blank(cls, name: str) -> Self:
        made = cls.__new__(cls)
        type(made).__name__ = name
        return made

    def _filled(self, state: dict[str, Any]) -> Self:
        """Take up a state that is nobody else's."""
        self.__dict__.update(state)
        self.graph = state["_graph"]
        return self


def _read(
    kind: type[DurableGraph],
    name: str,
    read: Callable[..., fx.GraphModule],
    state: dict[str, Any],
    imports: str,
) -> DurableGraph:
    """Unpickle: torch makes a plain GraphModule of the code."""
    found = state | {"_tracer_cls": _Reader}
    graph = read(found, imports).graph
    graph._tracer_cls = None
    return kind._blank(name)._filled(found | {"_tracer_cls": None, "_graph": graph})
