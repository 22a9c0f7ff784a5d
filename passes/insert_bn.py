"""Insert BatchNorm behind affine layers that feed a nonlinearity.

The rule is that of Ioffe & Szegedy 2015, section 3.2: BN stands between an affine map and the
elementwise nonlinearity; every consumer of the layer's output takes BN's output instead (Algorithm
2); the layer's bias is subsumed by beta and dropped. From the layer, the nonlinearity is looked for
through shape-only operators, dropout, pooling and residual adds. Left alone, with the reason, are

1. the output head, and a layer whose bounded nonlinearity is the model's output;
2. a layer whose output is normalised already;
3. a layer that reaches no elementwise nonlinearity, such as query, key and value projections;
4. a layer whose weight is tied to another operator;
5. a layer inside a module that is kept whole, or that the forward never calls.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.capture import assemble, owner_of
from bnfx.ledger import attribute, free_name
from bnfx.module_graph import ModuleGraph
from bnfx.operators import (
    Affine,
    Role,
    affine_module,
    affine_of,
    arguments,
    reads_shape_only,
    role_of,
)
from bnfx.reports import InsertRecord, InsertReport

Init = Literal["fresh", "identity"]
Filter = str | Sequence[str] | Callable[[InsertRecord], bool] | None

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Site:
    """An affine call that gets a BatchNorm.

    Attributes:
        node: The call.
        row: What kind of affine layer it is.
        path: Module path of the layer.
        weight: Name of its weight.
        bias: Name of its bias, None without one.
        nonlinearity: What its output reaches.
    """

    node: fx.Node
    row: Affine
    path: str
    weight: str
    bias: str | None
    nonlinearity: str


@dataclass(frozen=True)
class InsertBatchNorm:
    """Put a BatchNorm behind every affine call that feeds a nonlinearity.

    Attributes:
        init: "fresh" (gamma 1) or "identity" (gamma sqrt(1 + eps), so that eval outputs stay).
        include: Glob or globs over module paths, or a predicate on the record; None for all.
        exclude: Likewise, for layers to leave alone.
        eps: Added to the variance.
        momentum: Of the running statistics.
    """

    init: Init = "fresh"
    include: Filter = None
    exclude: Filter = None
    eps: float = 1e-5
    momentum: float = 0.1

    def match(self, captured: ModuleGraph) -> list[Site | InsertRecord]:
        """One entry for each affine call, in execution order, then what is never called."""
        modules = dict(captured.root.named_modules(remove_duplicate=False))
        found = [
            self._look(captured, modules, node, row)
            for node in captured.graph.nodes
            if (row := affine_of(node, modules)) is not None
        ]
        called = {entry.path for entry in found}
        return [*found, *_never_called(captured, modules, called)]

    def rewrite(
        self, captured: ModuleGraph, found: Iterable[Site | InsertRecord]
    ) -> tuple[fx.GraphModule, InsertReport]:
        """Carry out what `match` found, on the private copy that `captured` holds."""
        entries = list(found)
        sites = [entry for entry in entries if isinstance(entry, Site)]
        records = [
            entry if isinstance(entry, InsertRecord) else self._insert(captured, entry, sites)
            for entry in entries
        ]
        for name in {site.bias for site in sites if site.bias is not None}:
            if _may_go(captured, name, sites):
                _drop_bias(captured, name, sites)
        return _assemble(captured), InsertReport(tuple(records))

    def _look(
        self, captured: ModuleGraph, modules: dict[str, nn.Module], node: fx.Node, row: Affine
    ) -> Site | InsertRecord:
        path, weight, bias, channels = _parameters(captured.root, node, row)
        record = InsertRecord(path or node.name, row.kind, channels, "skipped", None, "")

        def skipped(reason: str) -> InsertRecord:
            return InsertRecord(record.path, row.kind, channels, "skipped", None, reason)

        if weight is None or path is None:
            return skipped("its weight is computed in the forward, not a parameter")
        if self.include is not None and not _chosen(self.include, record):
            return skipped("not chosen by include")
        if self.exclude is not None and _chosen(self.exclude, record):
            return skipped("chosen by exclude")
        tied = _other_readers(captured, modules, weight, path)
        if tied:
            return skipped(f"its weight is tied: {tied} reads it too")
        ends = _ends(node, modules)
        reason = _why_not(ends, node, modules)
        if reason:
            return skipped(reason)
        return Site(node, row, path, weight, bias, ends.nonlinearities[0].name)

    def _insert(self, captured: ModuleGraph, site: Site, sites: list[Site]) -> InsertRecord:
        root, graph, node = captured.root, captured.graph, site.node
        keeps_bias = site.bias is not None and not _may_go(captured, site.bias, sites)
        norm = self._norm(root, site, keeps_bias=keeps_bias)
        norm.training = root.training
        name = free_name(root, f"{site.path}_bn")
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent).add_module(leaf, norm)
        users = list(node.users)
        with graph.inserting_after(node):
            flat = (
                graph.call_function(torch.flatten, (node, 0, -2))
                if site.row.spatial is None
                else node
            )
        with graph.inserting_after(flat):
            out = graph.call_module(name, (flat,))
        if flat is not node:
            with graph.inserting_after(out):
                out = graph.call_method("view_as", (out, node))
        for user in users:
            user.replace_input_with(node, out)
        reason = f"feeds {site.nonlinearity!r}"
        return InsertRecord(site.path, site.row.kind, norm.num_features, "inserted", name, reason)

    def _norm(self, root: nn.Module, site: Site, *, keeps_bias: bool) -> _BatchNorm:
        weight = attribute(root, site.weight)
        assert isinstance(weight, Tensor)
        # Statistics of half-precision models are kept in float32: sums of squares overflow sooner.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        kind = _BATCH_NORMS[site.row.spatial or 1]
        norm = kind(
            _channels(site.row, weight, _groups(root, site)),
            eps=self.eps,
            momentum=self.momentum,
            device=weight.device,
            dtype=dtype,
        )
        assert norm.running_mean is not None
        with torch.no_grad():
            if self.init == "identity":
                norm.weight.fill_(math.sqrt(1 + self.eps))
            if site.bias is None:
                return norm
            bias = attribute(root, site.bias)
            assert isinstance(bias, Tensor)
            norm.bias.copy_(bias)
            if keeps_bias:  # a bias that stays is taken off again by the mean
                norm.running_mean.copy_(bias)
        return norm


@dataclass(frozen=True)
class _Ends:
    """Where the output of a layer goes, first things first."""

    nonlinearities: list[fx.Node]
    norms: list[fx.Node]
    past_add: set[fx.Node]
    others: list[fx.Node]


def _ends(node: fx.Node, modules: dict[str, nn.Module]) -> _Ends:
    ends = _Ends([], [], set(), [])
    seen: set[fx.Node] = set()
    queue = [(node, user, False) for user in node.users]
    while queue:
        value, user, past_add = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        role = role_of(user, modules)
        if past_add:
            ends.past_add.add(user)
        if role in (Role.NONLINEARITY, Role.SQUASHING):
            ends.nonlinearities.append(user)
        elif role is Role.NORM:
            ends.norms.append(user)
        elif role in (Role.MOVE, Role.ADD):
            queue.extend((user, after, past_add or role is Role.ADD) for after in user.users)
        elif not reads_shape_only(user, value):
            ends.others.append(user)
    return ends


def _why_not(ends: _Ends, node: fx.Node, modules: dict[str, nn.Module]) -> str:
    direct = [norm for norm in ends.norms if norm not in ends.past_add]
    if direct:
        return f"its output is normalised already, by {_call(direct[0])}"
    if not ends.nonlinearities and ends.norms:
        return f"its output is normalised already, behind an add, by {_call(ends.norms[0])}"
    if not ends.nonlinearities:
        if any(end.op == "output" for end in ends.others):
            return "output head: its output is the model's output"
        reached = _call(ends.others[0]) if ends.others else "nothing"
        return f"it feeds no elementwise nonlinearity but {reached}"
    squashed = all(role_of(n, modules) is Role.SQUASHING for n in ends.nonlinearities)
    if squashed and not _affine_after(node, modules):
        return f"output head: its {_call(ends.nonlinearities[0])} is the model's output"
    return ""


def _call(node: fx.Node) -> str:
    return f"{node.target!s}" if node.op in ("call_module", "call_method") else node.name


def _affine_after(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the output of `node` reaches another affine layer, or a module kept whole."""
    seen: set[fx.Node] = set()
    queue = list(node.users)
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        if affine_of(user, modules) is not None:
            return True
        if user.op == "call_module" and any(modules[str(user.target)].parameters()):
            return True
        queue.extend(user.users)
    return False


def _parameters(
    root: nn.Module, node: fx.Node, row: Affine
) -> tuple[str | None, str | None, str | None, int]:
    """Path, weight name, bias name and channels of an affine call."""
    if node.op == "call_module":
        path = str(node.target)
        module = root.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, Tensor)
        bias = f"{path}.bias" if module.bias is not None else None
        return (
            path,
            f"{path}.weight",
            bias,
            _channels(row, weight, int(getattr(module, "groups", 1))),
        )
    call = arguments(node, row.signature)
    names = [
        str(call[part].target)
        if isinstance(call[part], fx.Node) and call[part].op == "get_attr"
        else None
        for part in ("weight", "bias")
    ]
    if names[0] is None or (call["bias"] is not None and names[1] is None):
        return None, None, None, 0
    stored = attribute(root, names[0])
    assert isinstance(stored, Tensor)
    channels = _channels(row, stored, call["groups"])
    return owner_of(names[0]), names[0], names[1], channels


def _channels(row: Affine, weight: Tensor, groups: int) -> int:
    return weight.shape[1] * groups if row.transposed else weight.shape[0]


def _groups(root: nn.Module, site: Site) -> int:
    if site.node.op == "call_module":
        return int(getattr(root.get_submodule(site.path), "groups", 1))
    return int(arguments(site.node, site.row.signature)["groups"])


def _chosen(which: Filter, record: InsertRecord) -> bool:
    if which is None:
        return True
    if isinstance(which, str):
        return fnmatch.fnmatchcase(record.path, which)
    if isinstance(which, Sequence):
        return any(fnmatch.fnmatchcase(record.path, glob) for glob in which)
    return bool(which(record))


def _other_readers(
    captured: ModuleGraph, modules: dict[str, nn.Module], name: str, path: str
) -> str:
    """Who else reads the parameter `name`: another module that holds it, or a functional call."""
    parameter = attribute(captured.root, name)
    own = modules.get(path)
    for other_path, module in modules.items():
        if module is own or not other_path:
            continue
        if any(p is parameter for p in module._parameters.values()):
            return f"module {other_path!r}"
    for node in captured.graph.nodes:
        if node.op != "get_attr" or attribute(captured.root, str(node.target)) is not parameter:
            continue
        for user in node.users:
            row = affine_of(user, modules)
            if row is None or arguments(user, row.signature)["weight"] is not node:
                return f"operator {user.name!r}"
    return ""


def _may_go(captured: ModuleGraph, bias: str, sites: list[Site]) -> bool:
    """Whether every reader of this bias gets a BatchNorm, so that the bias can go."""
    served = {site.node for site in sites if site.bias == bias}
    path = owner_of(bias)
    parameter = attribute(captured.root, bias)
    names = [n for n, p in captured.root.named_parameters(remove_duplicate=False) if p is parameter]
    if len(names) != 1:
        return False
    for node in captured.graph.nodes:
        if (
            node.op == "call_module"
            and path
            and f"{node.target}." == f"{path}."
            and node not in served
        ):
            return False
        if node.op == "call_module" and path.startswith(f"{node.target}."):
            return False
        if node.op == "get_attr" and str(node.target) == bias and not set(node.users) <= served:
            return False
    return True


def _drop_bias(captured: ModuleGraph, bias: str, sites: list[Site]) -> None:
    path, _, leaf = bias.rpartition(".")
    captured.root.get_submodule(path).register_parameter(leaf, None)
    for site in sites:
        if site.bias != bias or site.node.op == "call_module":
            continue
        call = arguments(site.node, site.row.signature)
        old = call["bias"]
        site.node.args = tuple(None if arg is old else arg for arg in site.node.args)
        site.node.kwargs = {k: None if arg is old else arg for k, arg in site.node.kwargs.items()}
        if not old.users:
            captured.graph.erase_node(old)


def _never_called(
    captured: ModuleGraph, modules: dict[str, nn.Module], called: set[str]
) -> Iterable[InsertRecord]:
    whole = {str(n.target) for n in captured.graph.nodes if n.op == "call_module"}
    seen = {id(modules[path]) for path in called if path in modules}
    for path, module in modules.items():
        row = affine_module(module)
        if row is None or id(module) in seen:
            continue
        seen.add(id(module))
        weight = module.weight
        assert isinstance(weight, Tensor)
        outer = next((w for w in whole if path.startswith(f"{w}.")), None)
        reason = "the forward never calls it"
        if outer is not None:
            reason = (
                f"it lies inside {outer!r} ({type(modules[outer]).__name__}), which is kept whole"
            )
        channels = _channels(row, weight, int(getattr(module, "groups", 1)))
        yield InsertRecord(path, row.kind, channels, "skipped", None, reason)


def _assemble(captured: ModuleGraph) -> fx.GraphModule:
    """The GraphModule, with every parameter and buffer of the source, used or not."""
    root, graph = captured.root, captured.graph
    covered = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for name in root.state_dict(keep_vars=True):
        if name in covered or any(name.startswith(f"{path}.") for path in covered):
            continue
        if name.endswith("_extra_state"):
            continue
        with graph.inserting_before(first):  # a name that the graph reads survives copy and pickle
            graph.get_attr(name)
    return assemble(root, graph)
