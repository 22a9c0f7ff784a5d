"""Symbolic tracing, which both kinds of graphs share.

There are two kinds of graphs, one to train on (`bnfx.graphs.training`) and one to fold
(`bnfx.graphs.inference`). Both are made from a deep copy, so that the source stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from bnfx.errors import CaptureError
from bnfx.graphs.durable import DurableGraph
from bnfx.graphs.examples import Example, has_hooks, take_hooks
from bnfx.graphs.frames import note_frames
from bnfx.graphs.proxies import IS_TENSOR, TensorProxy, tensors_recognised

#: node.meta key: the ranks that the BatchNorm module behind a functional call accepts.
RANKS = "bnfx_ranks"

#: Values that a graph holds as they are: a proxy for them would only hide which way a forward goes.
NO_PROXY = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

#: What ends a string in the code that torch.fx writes; it puts names there as they are.
_UNQUOTABLE = frozenset('"\\\n\r')


class Tracer(fx.Tracer):
    """Symbolic tracing with chosen leaves, and with optional arguments at their defaults.

    A proxy is not None and has no truth value, so an optional argument that is traced as a proxy
    takes the wrong branch silently. Only required arguments and those given in the example become
    placeholders; the others keep their default, and are no arguments of the result.
    """

    def __init__(self, opaque: frozenset[str], given: Example | None) -> None:
        super().__init__()
        self.opaque = opaque
        self.given = given
        self.failed: str | None = None
        self._autocast = _autocast_state()
        self._entered: set[str] = set()
        self.read: dict[str, Any] = {}

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: FBT001  # the signature is torch.fx's
        concrete_args: Any = None,  # noqa: ARG002  # likewise
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for required and given arguments, values for the rest."""
        assert is_module
        signature = inspect.signature(root_fn)
        given: dict[str, Any] = {}
        if self.given is not None:
            bound = signature.bind(self.root, *self.given.args, **self.given.kwargs)
            given = bound.arguments
        args: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        variadic = []
        for name, parameter in list(signature.parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                variadic.append(str(parameter))
                if given.get(name):
                    raise fx.proxy.TraceError(f"forward takes {parameter}")
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = self._argument(parameter, given)
            else:
                args.append(self._argument(parameter, given))
        if variadic and not self.graph.find_nodes(op="placeholder"):
            raise fx.proxy.TraceError(f"forward takes {', '.join(variadic)} alone")
        return functools.partial(root_fn, **keywords) if keywords else root_fn, args

    def _argument(self, parameter: inspect.Parameter, given: dict[str, Any]) -> Any:
        optional = parameter.default is not parameter.empty
        if optional and parameter.name not in given:
            return parameter.default
        default = (parameter.default,) if optional else ()
        proxy = self.create_proxy("placeholder", parameter.name, default, {})
        value = given.get(parameter.name, parameter.empty)
        proxy.node.meta[IS_TENSOR] = _may_be_tensor(parameter, value)
        if not isinstance(value, NO_PROXY):
            return proxy
        # The graph holds what this value decided: it must refuse another one.
        checked = self.create_proxy("call_function", operator.eq, (proxy, value), {})
        words = (
            f"{parameter.name} was {value!r} in the example inputs, which this graph was made for"
        )
        self.create_proxy("call_function", torch._assert, (checked, words), {})
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value under tracing."""
        return TensorProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node; not in a region of autocast, which a graph of torch.fx leaves out."""
        if _autocast_state() != self._autocast:
            raise fx.proxy.TraceError("a part of it runs under torch.autocast")
        node = super().create_node(*args, **kwargs)
        note_frames(node)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that could not be traced, or whose hooks would run during tracing, stay whole."""
        return (
            module_qualified_name in self.opaque
            or has_hooks(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_arg(self, a: Any) -> Any:
        """Results keep their type: torch.fx turns any subclass of dict into a dict."""
        kind: Any = type(a)
        if issubclass(kind, fx.Proxy):  # which torch.fx would take for a tensor to hold
            return a.node
        if not issubclass(kind, dict) or kind is dict:
            return super().create_arg(a)
        if kind is OrderedDict:
            return self.create_node("call_function", kind, (self.create_arg([*a.items()]),), {})
        if dataclasses.is_dataclass(kind):
            names = [f.name for f in dataclasses.fields(kind)]
            fields = {name: self.create_arg(getattr(a, name)) for name in names}
            make: Any = kind
            return self.create_node("call_function", make, (), fields)
        raise NotImplementedError(f"a {kind.__name__}, which cannot be made in a graph")

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A module in which tracing fails stays whole: the innermost one."""
        path, last = self.path_of_module(m), self.graph._root.prev
        if not m._forward_pre_hooks:
            inspect.signature(m.forward).bind(*args, **kwargs)  # the error that a call would raise
        depth = len(self.module_stack)
        try:
            with nothing_drawn():
                out = super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is not None or self.is_leaf_module(m, path):
                self.failed = self.failed or path
                raise
            self.opaque |= {path}
            if path in self._entered:  # one call is in the graph already, and must stay whole too
                self.failed = path
                raise
            self._forget(last)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            return self.create_proxy("call_module", path, args, kwargs)
        self._entered.add(path)
        return out

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The same as torch.fx's; what was read is remembered."""
        self.read = parameter_proxy_cache
        if issubclass(type(attr_val), fx.Proxy):  # assigned by the forward
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _forget(self, last: fx.Node) -> None:
        """Erase the nodes behind `last`, and all knowledge of them."""
        gone = set()
        while (node := self.graph._root.prev) is not last:
            self.graph.erase_node(node)
            gone.add(node)
        for name in [name for name, proxy in self.read.items() if proxy.node in gone]:
            del self.read[name]


def _may_be_tensor(parameter: inspect.Parameter, value: object) -> bool:
    """Whether an argument is taken for a tensor: by the example, or by what is written of it."""
    if value is not parameter.empty:
        return isinstance(value, torch.Tensor)
    return not re.search(
        r"(?i)list|tuple|dict|sequence|iterable|mapping", str(parameter.annotation)
    )


def trace(
    kind: type[Tracer], model: nn.Module, opaque: frozenset[str], given: Example | None
) -> tuple[fx.Graph, frozenset[str]]:
    """Trace `model`; submodules in which that fails stay whole. The graph, and their paths."""
    graph = None
    while graph is None:
        tracer = kind(opaque, given)
        try:
            graph = _stateless(tracer, model)
        except Exception as error:  # a user's forward on proxies raises anything
            if tracer.failed is None or tracer.opaque == opaque:
                raise CaptureError(
                    f"the forward of {type(model).__name__} cannot be traced symbolically: {error}"
                ) from error
            opaque = tracer.opaque
    for node in graph.nodes:
        _require_quotable(node)
        node.type = None  # annotations are strings at times, which no pickle can import
    graph._tracer_cls = None  # unpickling would make a tracer of this class
    return graph, tracer.opaque


def _stateless(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """A trace of a forward that keeps nothing from one call for the next.

    A graph has no place for that: it would compute what the first call does, for ever. What is
    kept and never read (the last attention weights, say) does no harm.
    """
    if "forward" in vars(model):
        raise fx.proxy.TraceError("it is an attribute of the object, not of its class")
    with nothing_drawn(), tensors_recognised(), attributes_kept(model) as before:
        graph = tracer.trace(model)
        kept = _read_again(tracer, model, graph, _assigned(model, before))
    if kept is not None:
        raise fx.proxy.TraceError(
            f"it assigns to {kept!r}, which its next call reads; make that a buffer written in "
            "place, or pass it in and out"
        )
    return graph


#: A state of a module: its own attributes, and its tables of buffers and parameters.
_State = tuple[dict[str, Any], ...]


def _tables(module: nn.Module) -> _State:
    return vars(module), module._buffers, module._parameters


def _assigned(
    model: nn.Module, before: Mapping[nn.Module, _State]
) -> dict[str, tuple[object, object]]:
    """Attributes that are other objects than `before`: the old one and the new one, by name."""
    return {
        (f"{path}.{key}" if path else key): (old[key], now[key])
        for path, module in model.named_modules()
        for now, old in zip(_tables(module), before.get(module, ()), strict=False)
        for key in old
        if key in now and now[key] is not old[key]
    }


def _read_again(
    tracer: Tracer,
    model: nn.Module,
    graph: fx.Graph,
    assigned: Mapping[str, tuple[object, object]],
) -> str | None:
    """The name of one of the `assigned` attributes on which the next forward depends."""
    for node in graph.find_nodes(op="get_attr"):
        if str(node.target) in assigned:
            return str(node.target)
    for name, (old, now) in assigned.items():
        if isinstance(old, int | float) and isinstance(now, int | float) and old != now:
            again = type(tracer)(tracer.opaque, tracer.given).trace(model)
            return None if str(again) == str(graph) else name
    return None


def _require_quotable(node: fx.Node) -> None:
    if node.op in ("get_attr", "call_module") and set(str(node.target)) & _UNQUOTABLE:
        raise CaptureError(
            f"the name {node.target!r} holds a quote, a backslash or a line break, which torch.fx "
            "cannot write into code; rename the module"
        )


def assemble(root: nn.Module, graph: fx.Graph) -> DurableGraph:
    """`graph` with what it reads of `root`, in the mode and with the outer hooks of `root`."""
    graph.lint()
    module = DurableGraph(root, graph, class_name=type(root).__name__)
    theirs = dict(root.named_modules(remove_duplicate=False))
    for path, made in module.named_modules(remove_duplicate=False):
        made.training = theirs[path].training
    take_hooks(module, root)
    return module


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[dict[nn.Module, _State]]:
    """Put back, at the end, what a forward assigns to attributes; their values at the start.

    Run on proxies or on fake tensors, it would leave these behind in the model. Attributes that
    are new stay, unless they are proxies: torch.fx keeps constants in some.
    """
    before = {m: tuple(dict(table) for table in _tables(m)) for m in model.modules()}
    own = [v for m in before for key, v in vars(m).items() if not key.startswith("_")]
    dicts = [(value, dict(value)) for value in own if type(value) is dict]
    lists = [(value, list(value)) for value in own if type(value) is list]
    try:
        yield before
    finally:
        for table, entries in dicts:
            table.clear()
            table.update(entries)
        for values, items in lists:
            values[:] = items
        for module, tables in before.items():
            for now, old in zip(_tables(module), tables, strict=True):
                new = [key for key in now if key not in old and isinstance(now[key], fx.Proxy)]
                for key in new:
                    del now[key]
                now.update({key: old[key] for key in old if now.get(key) is not old[key]})


@contextmanager
def nothing_drawn() -> Iterator[None]:
    """Refuse tracing that draws random numbers: the graph would hold them for constants.

    The global generators are as before then.
    """
    before = torch.get_rng_state(), random.getstate()
    try:
        yield
        if not torch.equal(torch.get_rng_state(), before[0]) or random.getstate() != before[1]:
            raise fx.proxy.TraceError("it draws random numbers, which a graph would hold fixed")
    except Exception:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        raise


def _autocast_state() -> list[tuple[bool, torch.dtype]]:
    """Whether autocast is on, and to what, by kind of device."""
    kinds = ("cpu", "cuda")
    return [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
