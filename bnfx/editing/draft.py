"""A private copy of a model, under edit: what can be traced of it, and what was seen of it.

Modules are edited in their slots, which works for any model and keeps the class of the root.
Functional calls are edited in the graph of the largest part around them that can be traced, the
root at best; that part becomes a GraphModule.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnfx.editing.inserted import InsertedGraph
from bnfx.editing.preservation import agrees
from bnfx.editing.sightings import SeenCall, seen_calls
from bnfx.errors import BnfxError, CaptureError
from bnfx.graphs.examples import Example, clone
from bnfx.graphs.observed import SCOPES, observe
from bnfx.graphs.training import ByMode, ModuleGraph, module_graph
from bnfx.reports.report import remember, report


@dataclass(frozen=True)
class Region:
    """A part of the model that can be traced symbolically, and its graph.

    Attributes:
        path: Where it lies; "" for the whole model.
        graph: Over the modules below `path`.
        modules: The modules of the region, by the names the graph uses.
        fixed: Whether the graph takes just the arguments that the module takes.
    """

    path: str
    graph: fx.Graph
    modules: Mapping[str, nn.Module]
    fixed: bool = True

    def name(self, target: str) -> str:
        """Path in the whole model of what the graph calls `target`."""
        return ".".join(part for part in (self.path, target) if part)

    def caller(self, node: fx.Node) -> str:
        """Path in the whole model of the module whose forward made `node`."""
        if SCOPES in node.meta:
            return str(next(reversed(node.meta[SCOPES]), ""))
        stack = node.meta.get("nn_module_stack")
        return self.name(str(next(reversed(stack.values()))[0]) if stack else "")


class Draft:
    """A private copy of a model, under edit.

    Attributes:
        root: The copy.
        regions: What could be traced of it, the whole or parts.
        untraced: Paths of modules whose forward could not be traced.
        observed: The record of a run in eval mode on the example; None without an example.
        calls: Calls of dropout and local response normalisation in it.
    """

    def __init__(self, model: nn.Module, given: Example | None) -> None:
        self.root = clone(model)
        self.regions: list[Region] = []
        self.untraced: list[str] = []
        self.observed: fx.Graph | None = None
        self.calls: tuple[SeenCall, ...] | None = None
        if given is not None:
            self.observed = observe(model, given, training=False).graph
            self.calls = seen_calls(self.observed)
        self._changed: set[str] = set()
        self._trace("", clone(model), given)

    def _trace(self, path: str, module: nn.Module, given: Example | None) -> None:
        """Trace `module`, a part of a private copy, or what can be traced below it."""
        if _has_own_forward(module):
            captured = _traced(module, given)
            if captured is not None:
                self._add(path, captured)
                return
            self.untraced.append(path)
        for name, child in module.named_children():
            self._trace(f"{path}.{name}" if path else name, child, None)

    def _add(self, path: str, captured: ModuleGraph) -> None:
        modules = dict(captured.root.named_modules(remove_duplicate=False))
        fixed = not path or _takes_just_what_it_must(captured.root)
        self.regions.append(Region(path, captured.graph, modules, fixed))
        for whole in captured.opaque:
            inner = f"{path}.{whole}" if path else whole
            if _has_own_forward(modules[whole]):
                self.untraced.append(inner)
            for name, child in modules[whole].named_children():
                self._trace(f"{inner}.{name}", child, None)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every slot of the copy; a module in several slots comes several times."""
        return list(self.root.named_modules(remove_duplicate=False))

    def replace(self, path: str, module: nn.Module) -> None:
        """Put `module` into a slot."""
        parent, _, leaf = path.rpartition(".")
        owner = self.root.get_submodule(parent)
        owner._modules[leaf] = module

    def bypass(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` pass where the result of `node` went, and drop `node`."""
        region = self._edited_region(node)
        node.replace_all_uses_with(value)
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for source in inputs:
            if not source.users and source.op == "call_module" and _by_mode(region, source):
                source.graph.erase_node(source)

    def set_in_train(self, node: fx.Node, position: int, keyword: str, value: Any) -> None:
        """Give a constant argument of a call another value in train mode."""
        region = self._edited_region(node)
        old = argument(node, position, keyword, None)
        if isinstance(old, fx.Node):  # the graph reads it from a module of its own
            module = region.modules[str(old.target)]
            assert isinstance(module, ByMode)
            module.in_train = value
        elif len(node.args) > position:
            node.update_arg(position, value)
        else:
            node.update_kwarg(keyword, value)

    def in_graph(self, path: str) -> bool:
        """Whether the forward of the module at `path` is part of a graph."""
        traced = [r.path for r in self.regions if below(path, r.path)]
        untraced = [p for p in self.untraced if below(path, p)]
        longest = max((len(p) for p in untraced), default=-1)
        return any(len(p) > longest for p in traced)

    def _edited_region(self, node: fx.Node) -> Region:
        region = next(region for region in self.regions if region.graph is node.graph)
        self._changed.add(region.path)
        return region

    def finish(self) -> nn.Module:
        """The edited model: of the same class unless a functional call of the root was edited."""
        changed = [region for region in self.regions if region.path in self._changed]
        for region in sorted(changed, key=lambda region: -len(region.path)):
            old = self.root.get_submodule(region.path)
            made = _as_graph(old, region)
            if not region.path:
                return made
            for path, module in self.modules():
                if module is old:
                    self.replace(path, made)
        return self.root


def constant_by_mode(argument: Any, modules: Mapping[str, nn.Module]) -> tuple[Any, Any] | None:
    """An argument's value in train mode and in eval mode; None if only a run can tell."""
    if not isinstance(argument, fx.Node):
        return argument, argument
    module = modules.get(str(argument.target)) if argument.op == "call_module" else None
    return (module.in_train, module.in_eval) if isinstance(module, ByMode) else None


def argument(node: fx.Node, position: int, keyword: str, default: Any) -> Any:
    """An argument of a call, given by position or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def _by_mode(region: Region, node: fx.Node) -> bool:
    return isinstance(region.modules.get(str(node.target)), ByMode)


def below(path: str, top: str) -> bool:
    """Whether a module path is `top` or lies in it."""
    return not top or path == top or path.startswith(f"{top}.")


def _as_graph(module: nn.Module, region: Region) -> nn.Module:
    """`module` as its edited graph, with the report of it that there may be."""
    for name, child in region.modules.items():
        if isinstance(child, ByMode):
            module.add_module(name, child)
    origins = module._bnfx_origins if isinstance(module, InsertedGraph) else ()
    like = module if region.path else None
    made = InsertedGraph.build(module, region.graph, origins, like)
    try:
        return remember(made, report(module))
    except BnfxError:  # bnfx has not made the model that this is a part of
        return made


def _takes_just_what_it_must(module: nn.Module) -> bool:
    """Whether every argument of the forward is required, so that every caller gives all."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return all(p.kind in plain and p.default is p.empty for p in parameters)


def _traced(module: nn.Module, given: Example | None) -> ModuleGraph | None:
    """The trace of `module`, where there is one and it does what the module does."""
    try:
        captured = module_graph(module, given)
    except CaptureError:
        return None
    return captured if given is None or agrees(module, captured, given) else None


def _has_own_forward(module: nn.Module) -> bool:
    """Containers without a forward have nothing to trace; layers of torch.nn are known."""
    if type(module).forward is nn.Module.forward:
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")
