"""A graph that trains: torch.nn modules stay calls, and obey train() and eval()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from bnfx.errors import CaptureError
from bnfx.graphs.examples import Example, modes_kept, trains_hooks
from bnfx.graphs.parameters import free_name
from bnfx.graphs.tracing import Tracer, trace
from bnfx.operators.table import affine_module


class _ModuleTracer(Tracer):
    """Keeps the modules of torch.nn, and bnfx's own constants by mode, as calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        keeps = isinstance(m, ByMode) or names_its_state(m) or trains_hooks(m)
        return keeps or super().is_leaf_module(m, module_qualified_name)


def names_its_state(module: nn.Module) -> bool:
    """Whether it has a hook that gives its state_dict other names, as torch's wrappers have."""
    return bool(module._state_dict_hooks)


@dataclass(frozen=True)
class ModuleGraph:
    """A graph that trains: `graph` over the modules of `root`."""

    root: nn.Module
    graph: fx.Graph

    @property
    def opaque(self) -> list[str]:
        """Paths of the modules with parts of their own that the graph calls as a whole.

        Their forward could not be traced, does something else in train mode than in eval mode, has
        hooks around it, or is torch.nn's own.
        """
        called = dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "call_module")
        modules = {path: self.root.get_submodule(path) for path in called}
        return [
            path
            for path, module in modules.items()
            if affine_module(module) is None and any(True for _ in module.children())
        ]


def module_graph(root: nn.Module, given: Example | None) -> ModuleGraph:
    """Trace `root`, a private copy of the source, so that it can still be trained.

    The forward is traced in train mode and in eval mode. Where the two differ in a constant (as in
    `F.dropout(x, p, self.training)`), the graph reads `training` when it runs; where they differ in
    structure, the module in question stays whole.

    Raises:
        CaptureError: The root's own forward cannot be traced, or depends on the mode in structure.
    """
    if names_its_state(root):
        raise CaptureError(
            f"{type(root).__name__} gives its state_dict other names, which a graph would not"
        )
    opaque: frozenset[str] = frozenset()
    modes = {path: m.training for path, m in root.named_modules(remove_duplicate=False)}
    with modes_kept(root):
        while True:
            root.train()
            graph, opaque = trace(_ModuleTracer, root, opaque, given)
            root.eval()
            in_eval, grown = trace(_ModuleTracer, root, opaque, given)
            if grown != opaque:
                opaque = grown
                continue
            culprit = _merge_modes(root, graph, in_eval)
            if culprit is None:
                break
            if culprit == "" or culprit in opaque:
                raise CaptureError(
                    f"the forward of {type(root).__name__} does different things in train mode "
                    "and in eval mode, so that no single graph can be both"
                )
            opaque |= {culprit}
    for path, module in root.named_modules():
        if path not in modes:  # new: it has the mode of the module around it from the start
            module.training = modes[path.rpartition(".")[0]]
    return ModuleGraph(root, graph)


class ByMode(nn.Module):
    """A constant that an operator takes: one value in train mode, another in eval mode."""

    def __init__(self, in_train: Any, in_eval: Any) -> None:
        super().__init__()
        self.in_train = in_train
        self.in_eval = in_eval

    def forward(self) -> Any:
        """The value for the present mode."""
        return self.in_train if self.training else self.in_eval


def _merge_modes(root: nn.Module, train: fx.Graph, evaluation: fx.Graph) -> str | None:
    """Make `train` serve both modes. The path of the module that forbids it; None if it worked."""
    pairs = list(zip(train.nodes, evaluation.nodes, strict=False))
    twin = dict(pairs)
    constants: list[tuple[fx.Node, list[Any], list[Any]]] = []
    for ours, theirs in pairs:
        (mine, form), (other, other_form) = _leaves(ours), _leaves(theirs)
        if (ours.op, ours.target) != (theirs.op, theirs.target) or form != other_form:
            return _owner(ours)
        if not all(_matches(a, b, twin) for a, b in zip(mine, other, strict=True)):
            return _owner(ours)
        if any(not _same(a, b) for a, b in zip(mine, other, strict=True)):
            constants.append((ours, mine, other))
    if len(train.nodes) != len(evaluation.nodes):
        longer = max((train, evaluation), key=lambda graph: len(graph.nodes))
        return _owner(list(longer.nodes)[len(pairs)])
    for node, mine, other in constants:
        _choose_at_run_time(root, node, mine, other)
    return None


def _leaves(node: fx.Node) -> tuple[list[Any], Any]:
    """What a call is given, containers and slices opened, and these with nothing in them."""
    leaves: list[Any] = []
    form = map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves, form


def _matches(a: Any, b: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments are the same value of their graphs, or are constants both."""
    if isinstance(a, fx.Node):
        return twin.get(a) is b
    return not isinstance(b, fx.Node)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, fx.Node) or (type(a) is type(b) and bool(a == b))


def _choose_at_run_time(root: nn.Module, node: fx.Node, mine: list[Any], other: list[Any]) -> None:
    """Read the constants that differ from modules that stand where `self.training` was read."""
    chosen = iter([_by_mode(root, node, a, b) for a, b in zip(mine, other, strict=True)])
    given: Any = map_aggregate((node.args, node.kwargs), lambda _: next(chosen))
    node.args, node.kwargs = given


def _by_mode(root: nn.Module, node: fx.Node, a: Any, b: Any) -> Any:
    if _same(a, b):
        return a
    name = free_name(root, f"{_owner(node)}.mode_of_{node.name}".removeprefix("."))
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent).add_module(leaf, ByMode(a, b))
    with node.graph.inserting_before(node):
        return node.graph.call_module(name)


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward made `node`; "" for the root."""
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module" and paths[-1:] == [node.target]:
        paths.pop()  # the call of a module is made by the forward around it
    return paths[-1] if paths else ""
