"""The modules behind an inference graph: which of its changes a copy of the model can express.

A graph may give each call weights of its own, put constants between calls and drop operators. The
model's own code calls what it calls; there,

* a parameter has one value, for all that read it;
* a layer of torch.nn without a bias can get one, other code cannot;
* a BatchNorm vanishes with all its calls, or stays: its module becomes an `nn.Identity`, or where
  the class has an activation inside, a graph of what is left of it;
* values that code out of sight may see stay: those that leave a module with a forward of its own
  where optional arguments might return them, those around hooks, and what methods of the root that
  its forward calls are given and return;
* values that go into or out of modules inside stay where that leaves no BatchNorm more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfx.errors import CaptureError
from bnfx.gauges.choice import Gauges
from bnfx.gauges.constraints import CONSTANTS, LINEAR, Cause, Constraints, Demand, Kind, Site
from bnfx.gauges.elimination import Refused
from bnfx.gauges.linear_system import Rows
from bnfx.gauges.rank import of_same_rank
from bnfx.gauges.writing import call_of
from bnfx.gauges.written_out import part_of
from bnfx.graphs.baked import computes, has_own_hooks, why_not_put
from bnfx.graphs.biases import takes_bias
from bnfx.graphs.constants import Values
from bnfx.graphs.examples import has_hooks, skeleton
from bnfx.graphs.frames import frames_of
from bnfx.graphs.in_place import aliases
from bnfx.graphs.naming import OWNER, describe, owner_of
from bnfx.graphs.norms import STATE, holds_norm, is_norm, is_stock_norm
from bnfx.graphs.parameters import sweep
from bnfx.graphs.tracing import Tracer, trace
from bnfx.numbers import Ints
from bnfx.operators.table import Passage, is_batch_norm, passage_of

_HOOKED = "it has hooks, which see its input and output; remove them first"
_SPLIT = "its module is called several times, and at one of the calls it stays"
_MIXED = "its module computes more than this norm in a way that cannot be taken apart"
_ARITHMETIC = "a constant of the model's own code"


@dataclass(eq=False)
class Slots:
    """What the modules of `root` can take up of what is solved for its graph."""

    #: The module that the graph was captured from, or a copy of it; only looked at.
    root: nn.Module
    graph: fx.Graph
    values: Values
    #: Paths below `root` that code outside of the graph calls or reads.
    outside: frozenset[str] = frozenset()
    #: Whether values that leave a module with a forward of its own stay.
    closed: bool = False
    #: Paths of layers that cannot take up what was solved for them, and why.
    stuck: dict[str, str] = field(default_factory=dict)
    #: Ranks that what is left of a norm must check when the model runs, by its path.
    ranks: dict[str, int] = field(default_factory=dict)
    #: Modules and methods of modules that take or give other values than before.
    moved: set[str] = field(default_factory=set)
    #: Layers that carry the summands of norms that vanished, be they zero -> output channels.
    carriers: dict[str, int] = field(default_factory=dict)

    @functools.cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every slot of `root`."""
        return dict(self.root.named_modules(remove_duplicate=False))

    # -- what the solver must know -----------------------------------------------------------------

    @functools.cached_property
    def held(self) -> frozenset[fx.Node]:
        """Nodes whose values stay because code that the graph does not show may see them."""
        return frozenset(
            value
            for node in self.graph.nodes
            for value in node.all_input_nodes
            if self._is_seen(value, node)
        )

    def _is_seen(self, value: fx.Node, reader: fx.Node) -> bool:
        left, entered = self._crossed(value, reader)
        if any(map(has_own_hooks, (*left.values(), *entered.values()))):
            return True
        if self.closed and any(map(_has_own_forward, left.values())):
            return True
        return not self.values.is_constant(value) and any(
            "." not in frame for frame in frames_of(value) ^ frames_of(reader)
        )

    def _crossed(
        self, value: fx.Node, reader: fx.Node
    ) -> tuple[Mapping[str, nn.Module], Mapping[str, nn.Module]]:
        """The modules that a value leaves, and those that it enters, by path."""
        ours, theirs = scopes_of(value), scopes_of(reader)
        left = {p: self.modules[p] for p in ours if p not in theirs and p in self.modules}
        entered = {p: self.modules[p] for p in theirs if p not in ours and p in self.modules}
        return left, entered

    @functools.cached_property
    def borders(self) -> Mapping[fx.Node, frozenset[str]]:
        """Nodes whose values go into or out of modules, or methods of modules, and which these are.

        Called by itself, such a module gives what it gave if these values stay.
        """
        found: dict[fx.Node, set[str]] = {}
        for reader in self.graph.nodes:
            for value in reader.all_input_nodes:
                if value.op == "placeholder" or self.values.is_constant(value):
                    continue
                left, entered = self._crossed(value, reader)
                names = {path for path, m in (*left.items(), *entered.items()) if _is_block(m)}
                frames = frames_of(value) ^ frames_of(reader)
                names |= {frame.partition("#")[0] for frame in frames if "." in frame}
                if names:
                    found.setdefault(value, set()).update(names)
        return {value: frozenset(names) for value, names in found.items()}

    def hold(self, found: Constraints) -> None:
        """Let values at borders stay where that leaves no BatchNorm more, outer borders first."""
        cause_of = {node: Cause(node, describe(node)) for node, _ in found.watched}
        for node, labels in sorted(found.watched, key=lambda watched: self._depth(watched[0])):
            used = labels[labels > 0]
            zero = np.zeros_like(used)
            found.demand(Demand.SAME_SCALE, used, zero, cause=cause_of[node], soft=True)
            found.demand(Demand.UNSHIFTED, used, cause=cause_of[node], soft=True)

    def _depth(self, node: fx.Node) -> int:
        return min(name.count(".") for name in self.borders[node])

    def settle(self, found: Constraints, gauges: Gauges) -> None:
        """Note which borders are crossed by values that did not stay, and who carries summands."""
        moved = (self.borders[node] for node, labels in found.watched if gauges.moves(labels))
        self.moved = set().union(*moved)
        layers = [site for site in found.sites.values() if site.kind is Kind.AFFINE]
        gone = [site for site in gauges.eliminated if site.kind is Kind.BATCH_NORM]
        of, shift = gauges.bound.hard.of, gauges.bound.hard.shift
        free = [(shift.substituted(Rows.of((of[s.x], 1.0))).unknowns >= 0).any() for s in gone]
        given = _all_of([of[s.x] for s, before in zip(gone, free, strict=True) if before])
        taken = _all_of([of[s.y] for s, before in zip(gone, free, strict=True) if not before])
        self.carriers = {
            scope_of(site.node): len(site.y)
            for site in layers
            if np.isin(of[site.y], given).any() or np.isin(of[site.x], taken).any()
        }

    def demand(self, found: Constraints) -> None:
        """Add what the modules demand of the gauges of their calls."""
        self.hold(found)
        first: dict[str, Site] = {}
        for site in found.sites.values():
            why = self._why_stuck(site, found)
            cause = Cause(site.node, f"{describe(site.node)} of the model's own class: {why}")
            if why:
                _leave(found, site, cause)
                continue
            if site.kind in LINEAR and call_of(site).get("bias") is None and not self._adds(site):
                cause = Cause(site.node, f"{describe(site.node)}, which can get no bias")
                for labels in (site.x, site.y):
                    used = np.unique(labels)
                    found.demand(Demand.UNSHIFTED, used[used > 0], cause=cause)
            cause = Cause(site.node, f"{describe(site.node)}, whose parameters serve several calls")
            for name in _parameters(site):
                _same(found, first.setdefault(name, site), site, cause)

    def _why_stuck(self, site: Site, found: Constraints) -> str:
        """Why no gauge can be written into what the call reads; "" if it can."""
        call, removable = call_of(site), self._is_removable(site)
        names = list(_names(site))
        given = {name: call[name] for name in names if isinstance(call.get(name), fx.Node)}
        if site.kind in CONSTANTS and not given and not removable:
            return "it is a number in its code"
        for name, node in given.items():
            target = str(node.target)
            if self.values.known.value(node) is None or not self._is_stored(target):
                return "" if removable else f"its {name} is computed"
            if target in self.outside or owner_of(target) in self.outside:
                return "code outside of what was captured uses it"
            for reader in self.values.known.readers[target]:
                other = found.sites.get(reader)
                if other is None or not _reads_as(other, name, target):
                    return f"its {name} is read by {describe(reader)} too"
            if owner_of(target) in self.stuck:
                return self.stuck[owner_of(target)]
        if site.kind in CONSTANTS and site.where is not None:
            tensor = self.values.of(call.get(site.operand))
            if (tensor is None or tensor.numel() != site.where.numel()) and not removable:
                return "it has one value for several channels"
        missing = [name for name in names if call.get(name) is None]
        if site.kind is Kind.NORM and missing and not self._adds(site):
            return f"it has no {missing[0]}"
        if site.kind is Kind.BATCH_NORM and missing and not (removable or self._adds(site)):
            return f"it has no {missing[0]}"
        return ""

    def _adds(self, site: Site) -> bool:
        """Whether a parameter that the call has not can be given to its module."""
        module = self.modules.get(scope_of(site.node))
        if module is None or has_own_hooks(module):
            return False
        if site.kind is Kind.BATCH_NORM:
            return _is_stock(module)
        weight = call_of(site).get("weight")
        owner = self.modules.get(owner_of(str(getattr(weight, "target", ""))))
        own = owner is module and str(getattr(weight, "target", "")).endswith("weight")
        return own and site.kind is Kind.AFFINE and self._takes_bias(module)

    def _takes_bias(self, module: nn.Module) -> bool:
        if module not in self._biased:
            self._biased[module] = takes_bias(module)
        return self._biased[module]

    @functools.cached_property
    def _biased(self) -> dict[nn.Module, bool]:
        return {}

    def _is_removable(self, site: Site) -> bool:
        return _is_norm(site.node) and not self.why_kept(site.node)

    # -- which may vanish --------------------------------------------------------------------------

    def why_kept(self, node: fx.Node) -> str:
        """Why the module of a norm, or of a part of one, cannot give way to nothing."""
        if not _is_norm(node):
            return _ARITHMETIC
        path = scope_of(node)
        module = self.modules.get(path)
        if module is None or not path:
            return "it is a functional call in code that stays; use form='graph'"
        if has_hooks(module):
            return _HOOKED
        if path in self.outside:
            return "code outside of what was captured uses it"
        if path in self.stuck:
            return self.stuck[path]
        reader = self._other_reader(module)
        if reader is not None:
            return f"{describe(reader)} reads its parameters too"
        return "" if self.instead(path) is not None else f"{_MIXED}; use form='graph'"

    def _other_reader(self, module: nn.Module) -> fx.Node | None:
        """A node in no call of `module` that reads what it owns."""
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        tensors = {id(tensor) for tensor in own}
        return next(
            (
                reader
                for name, readers in self.values.known.readers.items()
                if id(self._tensor(name)) in tensors
                for reader in readers
                if self.modules.get(scope_of(reader)) is not module
            ),
            None,
        )

    def _tensor(self, name: str) -> Tensor | None:
        path, _, leaf = name.rpartition(".")
        owner = self.modules.get(path)
        return None if owner is None else {**owner._parameters, **owner._buffers}.get(leaf)

    def _is_stored(self, name: str) -> bool:
        """Whether the module has what the graph reads: that may be what it computes from it."""
        path, _, leaf = name.rpartition(".")
        if path in self.modules and computes(self.modules[path], leaf):
            return True  # it was captured as what it computes
        mine, read = self._tensor(name), self.values.known.tensors[name]
        return mine is not None and mine.shape == read.shape and torch.equal(mine, read)

    def _others(self, module: nn.Module) -> list[fx.Node]:
        """What calls of `module` compute of data besides the norm."""
        return [
            node
            for node in self.graph.nodes
            if "call" in node.op
            and any(self.modules.get(path) is module for path in scopes_of(node))
            and not _is_norm(node)
            and not self.values.is_constant(node)
            and passage_of(node) is not Passage.SHAPE
            and node.users
        ]

    def instead(self, path: str) -> nn.Module | None:
        """What can take the place of the norm at `path`; None where that is not known."""
        module = self.modules[path]
        if module not in self._instead:
            plain = _is_stock(module) or not self._others(module)
            self._instead[module] = nn.Identity() if plain else _without_norm(module)
        return self._instead[module]

    @functools.cached_property
    def _instead(self) -> dict[nn.Module, nn.Module | None]:
        return {}

    def checks(self, node: fx.Node, rank: int, vanished: frozenset[fx.Node]) -> bool:
        """Whether what is left of a norm can check that `node` has this rank, as it must."""
        behind = (scope_of(n) for n in of_same_rank(node) if n in vanished and is_norm(n))
        path = next((path for path in behind if _is_stock(self.modules[path])), None)
        if path is not None:
            self.ranks[path] = rank
        return path is not None

    def takes(self, name: str) -> bool:
        """Whether there is a parameter or buffer of this name, or its module may be given one."""
        path, _, leaf = name.rpartition(".")
        module = self.modules.get(path)
        if module is None:
            return False
        state = {**module._parameters, **module._buffers}
        if state.get(leaf) is not None or computes(module, leaf):
            return True
        return leaf in (
            ("weight", "bias") if _is_stock(module) else ("bias",) * self._takes_bias(module)
        )

    def not_put(self, new: Mapping[str, Tensor]) -> dict[str, str]:
        """Layers that compute what is to be written, and cannot, and why."""
        found = {}
        for name, value in new.items():
            path, _, leaf = name.rpartition(".")
            if computes(self.modules[path], leaf):
                found[path] = why_not_put(self.modules[path], leaf, value)
        return {path: why for path, why in found.items() if why}

    def written_over(self, before: fx.Graph, fresh: Iterable[fx.Node]) -> dict[str, str]:
        """Norms that must stay, since what they give is written in place, and why.

        Args:
            before: The graph before anything vanished.
            fresh: Calls that may not work in place any more: a module with a flag gives that up.
        """
        views, found = aliases(before), {}
        named = {node.name: node for node in before.nodes}
        for node in fresh:
            module = self.modules.get(scope_of(node))
            if module is not None and vars(module).get("inplace") is True:
                continue
            for other in views.groups[named[node.name].all_input_nodes[0]]:
                if _is_norm(other):
                    found[scope_of(other)] = (
                        f"{describe(node)} writes its output in place, and others read its input"
                    )
        return found

    def incomplete(self, vanished: frozenset[fx.Node]) -> dict[fx.Node, Refused]:
        """Norms that vanish at some of the calls of their module, and not at others."""
        calls: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if _is_norm(node):
                calls.setdefault(id(self.modules.get(scope_of(node))), []).append(node)
        return {
            node: Refused("", np.zeros(0, np.int64), _SPLIT)
            for nodes in calls.values()
            if not vanished.issuperset(nodes)
            for node in nodes
            if node in vanished
        }


def _all_of(labels: Sequence[Ints]) -> Ints:
    found: Ints = np.unique(np.concatenate([*labels, np.zeros(0, np.int64)]))
    return found[found > 0]


def scopes_of(node: fx.Node) -> Sequence[str]:
    """Paths of the modules in whose forward a call stands, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [_cleaned(str(path)) for path, _ in stack.values()]
    if OWNER in node.meta:
        paths.append(str(node.meta[OWNER]))
    return tuple(dict.fromkeys(filter(None, paths)))


def scope_of(node: fx.Node) -> str:
    """Path of the innermost of them; "" for the root."""
    return next(reversed(scopes_of(node)), "")


def _cleaned(path: str) -> str:
    plain = path.removeprefix("L['self']").removeprefix("L__self___").lstrip(".")
    return plain.partition("@")[0]


def _is_norm(node: fx.Node) -> bool:
    return is_norm(node) or part_of(node) is not None


def _is_stock(module: nn.Module) -> bool:
    """Whether its forward is the norm and nothing else."""
    if isinstance(module, _InstanceNorm):
        return type(module).forward is _InstanceNorm.forward and "forward" not in vars(module)
    return is_stock_norm(module)


def _is_block(module: nn.Module) -> bool:
    """Whether it is more than one layer, which may have a padding of its own."""
    layer = holds_norm(module) or isinstance(module, _ConvNd | nn.Linear)
    return not layer and any(True for _ in module.children())


def _has_own_forward(module: nn.Module) -> bool:
    return not type(module).forward.__module__.startswith("torch.nn.")


def _names(site: Site) -> Sequence[str]:
    """The arguments of a call that are its parameters."""
    if site.kind in CONSTANTS:
        return (site.operand,)
    return STATE if site.kind is Kind.BATCH_NORM else ("weight", "bias")


def _parameters(site: Site) -> Iterator[str]:
    call = call_of(site)
    for name in _names(site):
        value = call.get(name)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            yield str(value.target)


def _reads_as(site: Site, name: str, target: str) -> bool:
    """Whether the call reads `target` as this parameter, and as no other argument."""
    found = [key for key, value in call_of(site).items() if _is_named(value, target)]
    return found == [name if site.kind not in CONSTANTS else site.operand]


def _is_named(value: object, target: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and str(value.target) == target


def _leave(found: Constraints, site: Site, cause: Cause) -> None:
    """Let what the call reads stay as it is; where that is a constant, some gauges still pass."""
    if site.kind is Kind.SCALE:
        found.demand(Demand.SAME_SCALE, site.x, site.y, cause=cause)
    elif site.kind is Kind.SHIFT:
        for labels in (site.x, site.y):
            found.demand(Demand.SAME_SCALE, labels, np.zeros_like(labels), cause=cause)
        found.demand(Demand.SUM, site.y, site.x, site.x, factors=(1.0, 0.0), cause=cause)
    else:
        found.ground(site.x, cause)
        found.ground(site.y, cause)


def _same(found: Constraints, first: Site, site: Site, cause: Cause) -> None:
    """Let two calls that share a parameter have the same gauges."""
    if first is site:
        return
    if first.kind is not site.kind or len(first.x) != len(site.x) or len(first.y) != len(site.y):
        for labels in (first.x, first.y, site.x, site.y):
            found.ground(labels, cause)
        return
    for ours, theirs in ((first.x, site.x), (first.y, site.y)):
        differ: Ints = np.flatnonzero(ours != theirs)
        found.demand(Demand.SAME, ours[differ], theirs[differ], cause=cause)


class _Children(Tracer):
    """Goes through one forward; the modules that it calls stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def _without_norm(module: nn.Module) -> nn.Module | None:
    """The forward of a norm's class in eval mode, without the norm: its activation, mostly."""
    copied = skeleton(module).eval()
    try:
        graph, _ = trace(_Children, copied, frozenset(), None)
    except CaptureError:
        return None
    norms = [node for node in graph.nodes if is_batch_norm(node)]
    source = norms[0].args[0] if len(norms) == 1 and norms[0].args else None
    if not isinstance(source, fx.Node):
        return None
    norms[0].replace_all_uses_with(source)
    sweep(norms)
    if graph.find_nodes(op="get_attr"):
        return None
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    idle = all(type(module.get_submodule(path)) is nn.Identity for path in called)
    rest = nn.Identity() if idle and len(graph.nodes) == len(called) + 2 else None
    return rest or fx.GraphModule(module, graph, class_name=type(module).__name__)
