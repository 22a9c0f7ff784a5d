"""A model to train, under edit: a private copy, its traces, and what it was seen to do.

Modules are edited in their slots, which works for any model and keeps the class of the root.
Functional calls are edited in the graph of a part around them that can be traced, the root at best;
that part becomes a GraphModule. What is known of the copy is looked up when a pass asks for it, and
anew after each pass.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from bnfx.editing.declarations import ModelFacts, Preserved
from bnfx.editing.inserted import InsertedGraph
from bnfx.editing.preservation import agrees, floats
from bnfx.errors import BnfxError, CaptureError
from bnfx.graphs.agreement import outputs
from bnfx.graphs.examples import Example, clone, obstacle, twins, untouched
from bnfx.graphs.kept import Behind, Code, Kept, keep_class
from bnfx.graphs.observed import SCOPES, observe
from bnfx.graphs.origins import Origin
from bnfx.graphs.parameters import attribute
from bnfx.graphs.training import ByMode, module_graph
from bnfx.operators.table import affine_module
from bnfx.reports.report import Change, remember, report


@dataclass(eq=False)
class Region:
    """A part of the model, and a graph of what it does: traced, or seen in one run."""

    #: Where it lies; "" for the whole model.
    path: str
    #: The module there.
    root: nn.Module
    graph: fx.Graph
    #: The modules of the region, by the names the graph uses.
    modules: Mapping[str, nn.Module]
    #: What tracing made, by name: constants by mode, and tensors that no module holds.
    made: Mapping[str, object] = field(default_factory=dict)
    #: Paths, in the region, of modules with parts of their own that the graph calls as a whole.
    opaque: tuple[str, ...] = ()
    #: Whether the graph takes just the arguments that the module takes.
    fixed: bool = True
    #: How often the forward of each module ran, by path; empty where nothing was run.
    runs: Mapping[str, int] = field(default_factory=dict)
    #: The BatchNorms that were put into it.
    origins: list[Origin] = field(default_factory=list)
    #: Whether the module keeps its class, with the code of the edited graph for its forward.
    kept: bool = False
    #: Where that is enough: its own forward, and then one BatchNorm.
    behind: Behind | None = None

    def name(self, target: str) -> str:
        """Path in the whole model of what the graph calls `target`."""
        return ".".join(part for part in (self.path, target) if part)

    def value(self, name: str) -> object:
        """What the graph reads by `name`."""
        return self.made[name] if name in self.made else attribute(self.root, name)

    def scopes(self, node: fx.Node) -> tuple[str, ...]:
        """Paths in the region of the modules whose forward made `node`, outermost first."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = node.meta.get(SCOPES) or (path for path, _ in stack.values())
        return tuple(filter(None, map(str, paths)))

    def caller(self, node: fx.Node) -> str:
        """Path in the whole model of the module whose forward made `node`."""
        return self.name(next(reversed(self.scopes(node)), ""))


class Draft:
    """A private copy of a model, under edit."""

    #: The model given; it stays as it is.
    source: nn.Module
    #: The copy.
    root: nn.Module
    #: What passes did and left, in order.
    changes: list[Change]
    #: The BatchNorms that were inserted, by their paths.
    origins: dict[str, Origin]

    def __init__(self, model: nn.Module, given: Example | None) -> None:
        if said := obstacle(model):
            raise CaptureError(said)
        self.source, self.given, self.root = model, given, clone(model)
        self.changes, self.origins = [], {}
        #: The values of the source, for each parameter that no pass has changed.
        self.twins = twins(model, self.root)
        self._edited: dict[str, Region] = {}

    # -- looking -------------------------------------------------------------------------------

    @cached_property
    def seen(self) -> Region | None:
        """What a run in eval mode on the example did; None without an example."""
        return self._run(training=False)

    def seen_in_training(self) -> Region | None:
        """The same in train mode; None where that needs targets, say, or larger batches."""
        try:
            return self._run(training=True)
        except CaptureError:
            return None

    def _run(self, *, training: bool) -> Region | None:
        if self.given is None:
            return None
        with untouched(self.root, self.twins):
            try:
                done = observe(self.root, self.given, training=training)
            except CaptureError:
                outputs(self.root.train(training), self.given)  # whose error says where it was
                raise
        if not training:
            self._outputs = done.outputs
        modules = dict(self.root.named_modules(remove_duplicate=False))
        return Region("", self.root, done.graph, modules, runs=done.runs)

    @cached_property
    def whole(self) -> Region | None:
        """The trace of the whole model, where there is one and it does what the model does."""
        return self.traced("")

    @property
    def regions(self) -> list[Region]:
        """What can be traced: the whole or the largest parts, and parts of what it leaves whole."""
        return self._parts[0]

    @property
    def untraced(self) -> list[str]:
        """Paths of modules whose forward could not be traced."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[list[Region], list[str]]:
        regions: list[Region] = []
        untraced: list[str] = []

        def below(path: str) -> None:
            for name, _ in self.root.get_submodule(path).named_children():
                look(join(path, name))

        def look(path: str) -> None:
            module = self.root.get_submodule(path)
            traceable = _has_own_forward(module)
            region = None
            if traceable or affine_module(module) is not None:
                region = self.traced(path) if path else self.whole
            if region is not None:
                regions.append(region)
                for inner in region.opaque:
                    if _has_own_forward(region.modules[inner]):
                        untraced.append(region.name(inner))
                    below(region.name(inner))
                return
            if traceable:
                untraced.append(path)
            below(path)

        look("")
        return regions, untraced

    def traced(self, path: str) -> Region | None:
        """The trace of the module at `path`, where there is one that does what the module does."""
        module, given = self.root.get_submodule(path), None if path else self.given
        expected = self.seen and self._outputs
        with untouched(module, self.twins):
            try:
                captured = module_graph(module, given)
            except CaptureError:
                return None
            if given is not None and not agrees(captured, given, expected):
                return None
            modules = dict(module.named_modules(remove_duplicate=False))
            read = [
                str(n.target) for n in captured.graph.nodes if n.op in ("get_attr", "call_module")
            ]
            held = {name: attribute(module, name) for name in read}
            opaque, fixed = tuple(captured.opaque), not path or takes_just_what_it_must(module)
        made = {name: value for name, value in held.items() if not _holds(module, name)}
        return Region(path, module, captured.graph, modules, made, opaque, fixed)

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every slot of the copy; a module in several slots comes several times."""
        return list(self.root.named_modules(remove_duplicate=False))

    def in_graph(self, path: str) -> bool:
        """Whether the forward of the module at `path` is part of a graph."""
        traced = [r.path for r in self.regions if below(path, r.path)]
        untraced = [p for p in self.untraced if below(path, p)]
        longest = max((len(p) for p in untraced), default=-1)
        return any(len(p) > longest for p in traced)

    # -- editing -------------------------------------------------------------------------------

    def replace(self, path: str, module: nn.Module) -> None:
        """Put `module` into a slot."""
        parent, _, leaf = path.rpartition(".")
        self.root.get_submodule(parent)._modules[leaf] = module

    def open(self, path: str, *, kept: bool = False) -> Region:
        """The trace of the part at `path`, to edit its graph.

        It becomes a GraphModule, or with `kept` stays an object of its class.
        """
        if path not in self._edited:
            region = self.traced(path) if path else self.whole
            assert region is not None
            self._edited[path] = dataclasses.replace(region, kept=kept)
        return self._edited[path]

    def bypass(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` pass where the result of `node` went, and drop `node`."""
        region = self._edited_region(node)
        node.replace_all_uses_with(value)
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for source in inputs:
            if not source.users and isinstance(region.modules.get(str(source.target)), ByMode):
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

    def _edited_region(self, node: fx.Node) -> Region:
        region = next(region for region in self.regions if region.graph is node.graph)
        return self._edited.setdefault(region.path, region)

    # -- what the driver asks ------------------------------------------------------------------

    def picture(self) -> str:
        """The graphs under edit, or the modules, as text."""
        graphs = [f"{r.path or '(root)'}: {r.graph}" for r in self._edited.values()]
        return "\n".join(graphs) or str(self.root)

    def facts(self, declared: Preserved) -> ModelFacts:
        """What a pass with this declaration must preserve, as it is now."""
        named = {name for change in self.changes for name in change.values}
        if Preserved.STATE_VALUES not in declared:
            self.twins.clear()
        found: list[Tensor] | CaptureError | None = None
        if self.given is not None and declared & (Preserved.RUNS | Preserved.EVAL_OUTPUTS):
            try:
                found = floats(self.seen and self._outputs)
            except CaptureError as error:
                found = error
        kind = type(self.source).__name__
        return ModelFacts(kind, self.root.state_dict(), self.source.state_dict(), named, found)

    def settle(self, changes: Sequence[Change]) -> None:
        """Take up what a pass did: parts under edit become modules, and all is looked at anew."""
        self.changes += changes
        named = {name for change in changes for name in change.values}
        for name, value in self.root.state_dict(keep_vars=True).items():
            if name in named and value in self.twins:
                del self.twins[value]
        for path in sorted(self._edited, key=lambda path: -len(path)):
            region = self._edited[path]
            made = _as_its_class(region) if region.kept else _as_graph(region)
            for slot, module in self.modules():
                if module is region.root:
                    self._put(slot, made, region)
            for origin in region.origins:
                bias = None if origin.bias is None else region.name(origin.bias)
                norm = region.name(origin.norm)
                self.origins[norm] = Origin(region.name(origin.layer), bias, norm)
        self._edited = {}
        for known in ("seen", "whole", "_parts"):
            self.__dict__.pop(known, None)

    def _put(self, slot: str, made: nn.Module, region: Region) -> None:
        if not slot:
            self.root = made
            return
        self.replace(slot, made)
        parent = self.root.get_submodule(slot.rpartition(".")[0])
        if region.origins and isinstance(parent, nn.TransformerEncoderLayer):
            # Its fused kernel for inference would take the weights and leave the BatchNorm out.
            parent.activation_relu_or_gelu = 0


def constant_by_mode(argument: Any, modules: Mapping[str, nn.Module]) -> tuple[Any, Any] | None:
    """An argument's value in train mode and in eval mode; None if only a run can tell."""
    if not isinstance(argument, fx.Node):
        return argument, argument
    module = modules.get(str(argument.target)) if argument.op == "call_module" else None
    return (module.in_train, module.in_eval) if isinstance(module, ByMode) else None


def argument(node: fx.Node, position: int, keyword: str, default: Any) -> Any:
    """An argument of a call, given by position or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def below(path: str, top: str) -> bool:
    """Whether a module path is `top` or lies in it."""
    return not top or path == top or path.startswith(f"{top}.")


def join(prefix: str, path: str) -> str:
    """`path` below `prefix`; either may be empty."""
    return ".".join(filter(None, (prefix, path)))


def _holds(module: nn.Module, name: str) -> bool:
    try:
        attribute(module, name)
    except AttributeError:
        return False
    return True


def _as_graph(region: Region) -> nn.Module:
    """The module of a region as its edited graph, with the report of it that there may be."""
    module = region.root
    _take_what_was_made(region)
    before = [
        Origin(join(path, o.layer), o.bias and join(path, o.bias), join(path, o.norm))
        for path, inner in module.named_modules(remove_duplicate=False)
        if isinstance(inner, InsertedGraph | Kept)
        for o in inner._bnfx_origins
    ]
    like = module if region.path else None
    made = InsertedGraph.build(module, region.graph, [*before, *region.origins], like)
    try:
        return remember(made, report(module))
    except BnfxError:  # bnfx has not made the model that this is a part of
        return made


def _as_its_class(region: Region) -> nn.Module:
    """The module of a region itself, with another forward."""
    module = region.root
    _take_what_was_made(region)
    made = region.behind or Code.of(region.graph)
    keep_class(module, made, region.origins, region.path)
    return module


def _take_what_was_made(region: Region) -> None:
    for name, value in region.made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(region.root.get_submodule(parent), leaf, value)


def takes_just_what_it_must(module: nn.Module) -> bool:
    """Whether every argument of the forward is required, so that every caller gives all."""
    parameters = inspect.signature(module.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return all(p.kind in plain and p.default is p.empty for p in parameters)


def _has_own_forward(module: nn.Module) -> bool:
    """Containers without a forward have nothing to trace; layers of torch.nn are known."""
    if type(module).forward is nn.Module.forward:
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")
