"""Put new parameters into a graph and take eliminated calls out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bnfx.gauges.constraints import Kind, Site
from bnfx.gauges.new_weights import Pending
from bnfx.graphs.naming import owner_of, path_of
from bnfx.graphs.norms import norm_call
from bnfx.graphs.parameters import (
    Constants,
    Written,
    constants,
    free_name,
    set_tensor,
    sweep,
)
from bnfx.operators.calls import argument, given_arguments
from bnfx.operators.table import Passage, affine_of, layer_call, passage_of


@dataclass(frozen=True)
class Part:
    """One new tensor of one call."""

    #: The call.
    site: Site
    #: Name of the argument.
    argument: str
    #: What the argument was: a node, a number, or None.
    old: object
    #: In the stored dtype.
    value: Tensor
    #: What it was computed from.
    sources: tuple[str, ...]


def write(
    module: fx.GraphModule,
    changes: Sequence[Pending],
    eliminated: Sequence[Site],
    *,
    bounds: Mapping[fx.Node, tuple[tuple[Tensor | None, Tensor | None], Tensor]],
    rounded: bool,
) -> Written:
    """Carry out changes on `module`.

    Args:
        module: The graph.
        changes: New parameters.
        eliminated: Calls that give way to their operand.
        bounds: Clamping calls -> their new bounds in float64, and a tensor like them.
        rounded: Whether new values get their stored dtype; otherwise they stay in float64.
    """
    known = constants(module)
    parts = [part for pending in changes for part in _parts(pending, rounded=rounded)]
    gone = {site.node for site in eliminated}
    agreed = _agreed(parts, known, gone)
    before = [value for part in parts for value in part.site.node.all_input_nodes]
    unread = _unread(module.graph)
    before += [
        value
        for site in eliminated
        for value in site.node.all_input_nodes
        if value is not site.source or value not in unread
    ]
    done = Written()
    renamed: dict[fx.Node, dict[str, fx.Node]] = {}
    instead: dict[fx.Node, fx.Node] = {}
    for part in parts:
        name = _place(module, part, known, agreed)
        done.provenance[name] = part.sources
        assert part.site.like is not None
        done.dtypes[name] = part.site.like.dtype
        if part.argument in ("border", "addend"):
            instead[part.site.node] = _add_border(module.graph, part.site.node, name)
            continue
        with module.graph.inserting_before(part.site.node):
            renamed.setdefault(part.site.node, {})[part.argument] = module.graph.get_attr(name)
    for node, (pair, like) in bounds.items():
        instead[node] = _clamp(module, node, pair, like, done, rounded=rounded)
    for site in {part.site.node: part.site for part in parts}.values():
        _rename(site, renamed.get(site.node, {}))
    for site in eliminated:
        source = site.source
        assert source is not None
        while source in instead:
            source = instead[source]
        instead[site.node] = source
        _take_out(module.graph, site.node, source)
    sweep(before)
    return done


def _unread(graph: fx.Graph) -> set[fx.Node]:
    """Calls of which the output depends on none. They stay: erased, they would demand nothing."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output" and all(user in found for user in node.users):
            found.add(node)
    return found


def call_of(site: Site) -> dict[str, Any]:
    """The arguments of a site by name, those that hold its parameters among them."""
    node = site.node
    if site.kind is Kind.AFFINE:
        row = affine_of(node)
        assert row is not None
        return layer_call(node)
    if site.product is not None:
        return {"weight": site.product.weight, "bias": site.product.bias}
    if site.kind is Kind.BATCH_NORM:
        return norm_call(node)
    if site.kind is Kind.NORM:
        return {"weight": argument(node, 2, "weight"), "bias": argument(node, 3, "bias")}
    return {"input": argument(node, 0, "input"), "other": argument(node, 1, "other")}


def _parts(pending: Pending, *, rounded: bool) -> list[Part]:
    change = pending.compute(rounded=rounded)
    if change is None:
        return []
    sources = tuple(dict.fromkeys((*change.sources, *pending.carries)))
    site, call = change.site, call_of(change.site)
    assert site.like is not None
    found = []
    for name, value in change.tensors.items():
        if name == "constant":
            name = site.operand  # its name in the call
            if site.kind is Kind.SHIFT and passage_of(site.node) is Passage.SUBTRACT:
                value = -value  # the call goes on subtracting
            if passage_of(site.node) is Passage.DIVIDE:
                value = value.reciprocal()  # or dividing
        stored = value.to(site.like.dtype if rounded else value.dtype).to(site.like.device)
        found.append(Part(site, name, call.get(name), stored, sources))
    return found


def _agreed(parts: Sequence[Part], known: Constants, gone: set[fx.Node]) -> set[str]:
    """Names whose readers all want the same new value."""
    wanted: dict[str, dict[fx.Node, Part]] = {}
    for part in parts:
        if isinstance(part.old, fx.Node) and part.old.op == "get_attr":
            wanted.setdefault(str(part.old.target), {})[part.site.node] = part
    agreed = set()
    for name, by_node in wanted.items():
        readers = set(known.readers.get(name, ())) - gone
        # compared as they will be stored, so that rounding late or at once gives the same names
        values = [
            p.value.to(p.site.like.dtype) for p in by_node.values() if p.site.like is not None
        ]
        same = all(torch.equal(values[0], other) for other in values[1:])
        if same and readers <= set(by_node) and _once(name, by_node):
            agreed.add(name)
    return agreed


def _once(name: str, by_node: dict[fx.Node, Part]) -> bool:
    """Whether each call reads the name for one argument only."""
    return all(
        sum(isinstance(n, fx.Node) and str(n.target) == name for n in call_of(p.site).values()) == 1
        for p in by_node.values()
    )


def _place(module: fx.GraphModule, part: Part, known: Constants, agreed: set[str]) -> str:
    """Store the new tensor and give its name."""
    name = _name(module, part, known, agreed)
    old = known.value(part.old)
    if old is None:
        weight = call_of(part.site).get("weight")
        old = known.value(weight)
    trained = old is not None and old.requires_grad
    buffer = old is not None and not isinstance(old, torch.nn.Parameter)
    set_tensor(module, name, part.value, trained=trained, buffer=buffer)
    return name


def _name(module: fx.GraphModule, part: Part, known: Constants, agreed: set[str]) -> str:
    node, old = part.site.node, part.old
    if isinstance(old, fx.Node) and old.op == "get_attr":
        name = str(old.target)
        leaf = name.rpartition(".")[2]
        own = owner_of(name)
        return name if name in agreed else free_name(module, f"{own}.{leaf}_of_{node.name}")
    weight = call_of(part.site).get("weight")
    if part.argument == "bias" and isinstance(weight, fx.Node) and weight.op == "get_attr":
        name = _bias_name(str(weight.target))
        if name not in known.readers:
            return free_name(module, name) if _taken(module, name) else name
        return free_name(module, f"{owner_of(name)}.bias_of_{node.name}")
    path = path_of(node)
    if path == node.name:
        return free_name(module, f"{node.name}_{part.argument}")
    return free_name(module, f"{path}.{part.argument}")


def _taken(module: fx.GraphModule, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    owner = dict(module.named_modules(remove_duplicate=False)).get(path)
    return owner is not None and getattr(owner, leaf, None) is not None


def _bias_name(weight: str) -> str:
    path, _, leaf = weight.rpartition(".")
    bias = leaf.removesuffix("weight") + "bias" if leaf.endswith("weight") else f"{leaf}_bias"
    return f"{path}.{bias}" if path else bias


def _rename(site: Site, new: dict[str, fx.Node]) -> None:
    """Make the call read its new parameters."""
    node = site.node
    if site.kind is Kind.PRODUCT:
        for name, value in new.items():
            node.replace_input_with(call_of(site)[name], value)
        return
    if site.kind in (Kind.AFFINE, Kind.BATCH_NORM):
        named = given_arguments(node) | new
        node.args = (named.pop("input"),)
        node.kwargs = named
        return
    positions = {"weight": 2, "bias": 3, "input": 0, "other": 1}
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in new.items():
        at = positions[name]
        if at < len(args):
            args[at] = value
        elif name == "input" and "self" in kwargs:
            kwargs["self"] = value
        else:
            kwargs[name] = value
    node.args, node.kwargs = tuple(args), kwargs
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and target._overloadname == "Scalar":
        node.target = target.overloadpacket.Tensor  # the operand is a tensor now


def _add_border(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    """Add a border map, or the bias of a product, to what a call gives; the sum takes its place."""
    with graph.inserting_after(node):
        border = graph.get_attr(name)
    with graph.inserting_after(border):
        total = graph.call_function(torch.add, (node, border))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    return total


def _clamp(
    module: fx.GraphModule,
    node: fx.Node,
    bounds: tuple[Tensor | None, Tensor | None],
    like: Tensor,
    done: Written,
    *,
    rounded: bool,
) -> fx.Node:
    """A clamp with bounds for each channel in place of `node`."""
    graph, path = module.graph, path_of(node)
    prefix = f"{node.name}_" if path == node.name else f"{path}."
    value: fx.Node = argument(node, 0, "input")
    for bound, part, function in (
        (bounds[0], "lower", torch.maximum),
        (bounds[1], "upper", torch.minimum),
    ):
        if bound is None:
            continue
        name = free_name(module, f"{prefix}{part}")
        stored = bound.to(like.dtype if rounded else bound.dtype).to(like.device)
        set_tensor(module, name, stored, trained=False, buffer=True)
        done.dtypes[name] = like.dtype
        with graph.inserting_before(node):
            value = graph.call_function(function, (value, graph.get_attr(name)))
            value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    return value


def _take_out(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    for user in list(node.users):
        # x.flatten(0, -2) -> BatchNorm -> view_as(x): nothing is left of the two
        flat = argument(source, 0, "input") if passage_of(source) is Passage.MOVE else None
        if isinstance(flat, fx.Node) and user.target == "view_as" and (user.args == (node, flat)):
            user.replace_all_uses_with(flat)
            graph.erase_node(user)
    node.replace_all_uses_with(source)
    graph.erase_node(node)
