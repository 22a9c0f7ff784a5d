"""Fold BatchNorm into the layer before it.

In eval mode a BatchNorm is, per channel, y = s x + t (Ioffe & Szegedy 2015, section 3.1):

    s = gamma / sqrt(var + eps)        t = beta - mean * s

Behind an affine layer x = W u + b this is the affine layer

    W' = s W                           b' = s b + t

with s along the output channels of W. Both are computed in float64 and rounded once.

A BatchNorm is folded if all of this is proved from the graph: it uses running statistics that
nothing writes; its input is the output of a convolution, transposed convolution or linear layer,
and nobody else sees that output; the layer's weight and bias are constants; the channels of the
layer are the axis that the BatchNorm normalises. Everything else is left with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.capture import RANKS, batch_norm_path, has_hooks, owner_of
from bnfx.ledger import (
    Constants,
    affine_ranks,
    constants,
    erase_dead,
    free_name,
    set_parameter,
)
from bnfx.operators import BATCH_NORM, Affine, affine_of, arguments, reads_shape_only
from bnfx.reports import FoldRecord, FoldReport


@dataclass(frozen=True)
class Site:
    """A BatchNorm that can be folded.

    Attributes:
        norm: The BatchNorm call.
        layer: The affine call before it.
        row: What kind of affine layer that is.
        weight: Folded weight, in the stored dtype.
        bias: Folded bias, in the stored dtype.
        guard: Rank that the layer's output must have; None where the graph proves it.
        sources: Names of the parameters and buffers that went in.
    """

    norm: fx.Node
    layer: fx.Node
    row: Affine
    weight: Tensor
    bias: Tensor
    guard: int | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A BatchNorm that stays, and why."""

    norm: fx.Node
    path: str
    reason: str


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every BatchNorm that directly follows an affine layer.

    Attributes:
        ranks: Ranks of values by node name, measured on example inputs; empty without any.
    """

    ranks: dict[str, int]

    def match(self, module: fx.GraphModule) -> list[Site | Kept]:
        """One entry for each BatchNorm evaluation, in execution order. Changes nothing."""
        known = constants(module)
        modules = dict(module.named_modules(remove_duplicate=False))
        found: list[Site | Kept] = []
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target in BATCH_NORM:
                found.append(self._look(module, node, known))
            if node.op == "call_module":
                found.extend(_kept_whole(node, modules[str(node.target)]))
        return found

    def rewrite(self, module: fx.GraphModule, found: Iterable[Site | Kept]) -> FoldReport:
        """Carry out what `match` found, on `module` itself."""
        records: list[FoldRecord] = []
        provenance: dict[str, tuple[str, ...]] = {}
        sites = [entry for entry in found if isinstance(entry, Site)]
        readers = constants(module).readers
        for entry in found:
            if isinstance(entry, Kept):
                records.append(FoldRecord(entry.path, "kept", (), entry.reason))
                continue
            layer = owner_of(str(arguments(entry.layer, entry.row.signature)["weight"].target))
            path = batch_norm_path(entry.norm)
            provenance |= _write(module, entry, sites, readers)
            records.append(FoldRecord(path, "folded", (layer,), ""))
        return FoldReport(tuple(records), provenance)

    def _look(self, module: fx.GraphModule, norm: fx.Node, known: Constants) -> Site | Kept:
        path = batch_norm_path(norm)
        args = arguments(norm, BATCH_NORM[norm.target])  # type: ignore[index]  # as the caller saw
        reason = _not_affine_map(args, known)
        if reason:
            return Kept(norm, path, reason)
        layer, flattened = _before(args["input"])
        row = affine_of(layer, {}) if layer is not None else None
        if layer is None or row is None:
            return Kept(norm, path, f"its input is {_describe(args['input'])}, not an affine layer")
        between = args["input"] if flattened else layer
        if flattened and row.spatial is not None:
            return Kept(norm, path, f"its input is a flattened {row.kind}, whose channels moved")
        for value in {layer, between}:
            others = [
                user
                for user in value.users
                if user not in (norm, between) and not reads_shape_only(user, value)
            ]
            if others:
                return Kept(
                    norm, path, f"the output of {_describe(value)} is also read by {_names(others)}"
                )
        wanted = 2 if row.spatial is None else row.spatial + 2
        rank = 2 if flattened else self._rank(module, norm, layer)
        if rank is not None and rank != wanted:
            return Kept(
                norm,
                path,
                f"it normalises axis 1 of a rank-{rank} tensor, which is not the channel axis of "
                f"{_describe(layer)}",
            )
        site = _solve(norm, layer, row, args, known)
        if isinstance(site, str):
            return Kept(norm, path, site)
        return site if rank is not None else replace(site, guard=wanted)

    def _rank(self, module: fx.GraphModule, norm: fx.Node, layer: fx.Node) -> int | None:
        """Rank of the BatchNorm's input: measured, demanded by its class, or proved."""
        if layer.name in self.ranks:
            return self.ranks[layer.name]
        accepted = norm.meta.get(RANKS, frozenset())
        if len(accepted) == 1:
            return int(next(iter(accepted)))
        return affine_ranks(module, layer)


def _not_affine_map(args: dict[str, Any], known: Constants) -> str:
    """Why this BatchNorm is not a fixed affine map per channel; "" if it is one."""
    if args["training"] is not False:
        return "it normalises with batch statistics (train mode); call model.eval() first"
    if args["running_mean"] is None or args["running_var"] is None:
        return "it has no running statistics, so its scale depends on the batch"
    for name in ("running_mean", "running_var", "weight", "bias"):
        if args[name] is not None and known.value(args[name]) is None:
            return f"its {name} is computed, or written while the network runs"
    if not isinstance(args["eps"], float | int):
        return "its eps is computed while the network runs"
    return ""


def _before(value: object) -> tuple[fx.Node | None, bool]:
    """The node whose channels the BatchNorm sees, and whether its leading axes are flattened."""
    if not isinstance(value, fx.Node):
        return None, False
    if value.target is not torch.flatten and value.target != "flatten":
        return value, False
    if value.args[1:] != (0, -2) or value.kwargs or not isinstance(value.args[0], fx.Node):
        return value, False
    return value.args[0], True


def _solve(
    norm: fx.Node, layer: fx.Node, row: Affine, args: dict[str, Any], known: Constants
) -> Site | str:
    """The folded weight and bias, or why there are none."""
    call = arguments(layer, row.signature)
    weight, bias = known.value(call["weight"]), known.value(call["bias"])
    if weight is None:
        return f"the weight of {_describe(layer)} is computed, or written while the network runs"
    if call["bias"] is not None and bias is None:
        return f"the bias of {_describe(layer)} is computed, or written while the network runs"
    if not weight.is_floating_point():
        return f"the weight of {_describe(layer)} is {weight.dtype}, not floating point"
    mean, var = (_float64(known.value(args[name])) for name in ("running_mean", "running_var"))
    assert mean is not None
    assert var is not None
    gamma, beta = (_float64(known.value(args[name])) for name in ("weight", "bias"))
    scale = (var + args["eps"]).rsqrt() if gamma is None else gamma / (var + args["eps"]).sqrt()
    shift = -mean * scale if beta is None else beta - mean * scale
    wide = weight.detach().double()
    groups = call["groups"] if row.transposed else 1
    folded = scale_output(wide, scale, transposed=row.transposed, groups=groups).to(weight.dtype)
    new_bias = (shift if bias is None else bias.detach().double() * scale + shift).to(weight.dtype)
    bad = ~(torch.isfinite(scale) & torch.isfinite(new_bias))
    if bool(bad.any()) or not bool(torch.isfinite(folded).all()):
        channels = bad.nonzero().flatten().tolist()[:8]
        return f"its folded weights are not finite in {weight.dtype} (channels {channels})"
    tensors = [call["weight"], call["bias"], *(args[k] for k in _STATE)]
    sources = tuple(str(t.target) for t in tensors if isinstance(t, fx.Node))
    return Site(norm, layer, row, folded, new_bias, None, sources)


_STATE = ("running_mean", "running_var", "weight", "bias")


def scale_output(weight: Tensor, scale: Tensor, *, transposed: bool, groups: int) -> Tensor:
    """`weight` with each output channel c multiplied by `scale[c]`.

    Args:
        weight: (out, in / groups, ...), or (in, out / groups, ...) for a transposed convolution.
        scale: (out,).
        transposed: Which of the two layouts `weight` has.
        groups: Groups of a transposed convolution, in which case output channel c lies in group
            c // (out / groups).
    """
    if not transposed:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.unflatten(0, (groups, -1))
    factors = scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    scaled: Tensor = (grouped * factors).flatten(0, 1)
    return scaled


def _write(
    module: fx.GraphModule,
    site: Site,
    sites: list[Site],
    readers: dict[str, tuple[fx.Node, ...]],
) -> dict[str, tuple[str, ...]]:
    """Rewrite one layer and take its BatchNorm out. What the new parameters were computed from."""
    graph = module.graph
    call = arguments(site.layer, site.row.signature)
    own = owner_of(str(call["weight"].target))
    named = {"weight": str(call["weight"].target)}
    named["bias"] = (
        str(call["bias"].target) if call["bias"] is not None else _bias_name(named["weight"])
    )
    shared = any(_is_shared(name, site, sites, readers) for name in named.values())
    new = {}
    for part, value in (("weight", site.weight), ("bias", site.bias)):
        name = named[part]
        if shared or (call[part] is None and name in readers):
            name = free_name(module, f"{own}.{part}_of_{site.norm.name}")
        trained = call["weight"] is None or _requires_grad(module, str(call["weight"].target))
        set_parameter(module, name, value, trained=trained)
        new[part] = name
    with graph.inserting_before(site.layer):
        nodes = {part: graph.get_attr(name) for part, name in new.items()}
    plain = {k: v for k, v in (call | nodes).items() if k in _given(site) | {"weight", "bias"}}
    old = [node for node in (call["weight"], call["bias"]) if isinstance(node, fx.Node)]
    first = plain.pop("input")
    site.layer.args, site.layer.kwargs = (first,), plain
    if site.guard is not None:
        _guard_rank(graph, site)
    statistics = [n for n in site.norm.all_input_nodes if n.op == "get_attr"]
    flat = _norm_input(site.norm)
    for user in list(site.norm.users):
        # flatten, then back to the layer's own shape: nothing is left of the two
        if user.target == "view_as" and user.args == (site.norm, site.layer):
            user.replace_all_uses_with(site.layer)
            graph.erase_node(user)
    site.norm.replace_all_uses_with(flat)
    graph.erase_node(site.norm)
    if flat is not site.layer:
        erase_dead(graph, [flat])
    erase_dead(graph, dict.fromkeys([*old, *statistics]))
    return dict.fromkeys(new.values(), site.sources)


def _given(site: Site) -> set[str]:
    return set(site.row.signature[: len(site.layer.args)]) | set(site.layer.kwargs) | {"input"}


def _norm_input(norm: fx.Node) -> fx.Node:
    value = arguments(norm, BATCH_NORM[norm.target])["input"]  # type: ignore[index]  # a BatchNorm
    assert isinstance(value, fx.Node)
    return value


def _bias_name(weight: str) -> str:
    path, _, leaf = weight.rpartition(".")
    bias = leaf.removesuffix("weight") + "bias" if leaf.endswith("weight") else f"{leaf}_bias"
    return f"{path}.{bias}" if path else bias


def _requires_grad(module: fx.GraphModule, name: str) -> bool:
    value = operator.attrgetter(name)(module)
    return isinstance(value, Tensor) and value.requires_grad


def _is_shared(
    name: str, site: Site, sites: list[Site], readers: dict[str, tuple[fx.Node, ...]]
) -> bool:
    """Whether a reader of this parameter needs another value than `site` gives it."""
    agreeing = {
        other.layer
        for other in sites
        if torch.equal(other.weight, site.weight) and torch.equal(other.bias, site.bias)
    }
    return any(reader not in agreeing for reader in readers.get(name, ()))


def _guard_rank(graph: fx.Graph, site: Site) -> None:
    """Where nothing proves the rank, the result checks it when it runs, instead of being wrong."""
    message = (
        f"folding the BatchNorm behind {_describe(site.layer)} holds for rank {site.guard} only; "
        "fold again with example_inputs"
    )
    with graph.inserting_after(site.layer):
        rank = graph.call_method("dim", (site.layer,))
    with graph.inserting_after(rank):
        fits = graph.call_function(operator.eq, (rank, site.guard))
    with graph.inserting_after(fits):
        graph.call_function(torch._assert, (fits, message))


def _kept_whole(node: fx.Node, module: nn.Module) -> Iterable[Kept]:
    """Records of the BatchNorms inside a module that the graph calls as a whole."""
    for name, inner in module.named_modules():
        if not isinstance(inner, _BatchNorm):
            continue
        path = f"{node.target}.{name}" if name else str(node.target)
        yield Kept(node, path, _why_whole(inner, outer=None if inner is module else module))


def _why_whole(norm: _BatchNorm, *, outer: nn.Module | None) -> str:
    if outer is not None:
        return (
            f"it lies inside a {type(outer).__name__} that cannot be traced or has hooks; "
            "pass example_inputs, or remove the hooks"
        )
    if norm.training:
        return "it normalises with batch statistics (train mode); call model.eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics, so its scale depends on the batch"
    if has_hooks(norm):
        return "it has hooks, which see its input and output; remove them first"
    return f"{type(norm).__name__} has a forward of its own that cannot be traced"


def _float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _describe(value: object) -> str:
    """A node in a user's words: the layer's path where it has one."""
    if not isinstance(value, fx.Node):
        return repr(value)
    row = affine_of(value, {})
    if row is not None:
        weight = arguments(value, row.signature)["weight"]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return f"{row.kind} {owner_of(str(weight.target))!r}"
    if value.op == "call_module":
        return f"module {value.target!r}"
    return f"{value.op.removeprefix('call_')} {value.name!r}"


def _names(nodes: Iterable[fx.Node]) -> str:
    return ", ".join(_describe(node) for node in nodes)
