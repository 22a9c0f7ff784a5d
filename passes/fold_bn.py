"""Fold every BatchNorm for which an exact rewrite without an added operator is proved.

In eval mode a BatchNorm is, per channel, y = s x + t (Ioffe & Szegedy 2015, section 3.1):

    s = gamma / sqrt(var + eps)        t = beta - mean * s

Every tensor of the graph gets a gauge per channel, x' = a (x + d), that the layers around it can
take up in their weights. The BatchNorm vanishes iff a_x = s a_y and d_y = s d_x - t hold together
with what all other operators demand (`bnfx.gauges.rules`, `bnfx.gauges.choice`). Behind a
convolution that it alone reads this is the usual W' = s W, b' = s b + t; before one that pads
nothing, W' = W s, b' = b + W t; and across residual sums, concatenations and pooling it is one
joint system.

All weights are computed in float64 and rounded once. A BatchNorm that stays, stays one BatchNorm.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.gauges import written_out
from bnfx.gauges.choice import Gauges, Solver
from bnfx.gauges.constraints import Constraints, Kind, Site
from bnfx.gauges.elimination import Refused, absorber
from bnfx.gauges.explanation import UNCARRIED, Explanation
from bnfx.gauges.new_weights import Ends, Pending, bounds_of, change_of, is_changed
from bnfx.gauges.provenance import vanished_into
from bnfx.gauges.rules import propagate
from bnfx.gauges.soundness import NARROW, WIDE
from bnfx.gauges.walk import Options, Walk
from bnfx.gauges.writing import Written, write
from bnfx.graphs.constants import Values, readers
from bnfx.graphs.examples import has_hooks
from bnfx.graphs.in_place import Aliases, aliases, barred
from bnfx.graphs.inference import NOT_EXPORTED
from bnfx.graphs.naming import describe, norm_path
from bnfx.graphs.norms import affine_map_of, holds_norm, is_norm
from bnfx.graphs.parameters import constants
from bnfx.graphs.shapes import Shapes, at_other_ranks, is_tensor, shapes_of
from bnfx.graphs.tracing import RANKS
from bnfx.operators.layers import BATCH_NORM, affine_of
from bnfx.operators.passages import Passage, passage_of
from bnfx.operators.roles import Role, role_of
from bnfx.reports.report import FoldRecord


@dataclass(frozen=True)
class Plan:
    """What will be done to a graph.

    Attributes:
        eliminated: Calls that vanish, in order.
        changes: New parameters, computed when they are written.
        records: One for each evaluation of a BatchNorm, by the name of its node and its own path.
        guards: Nodes whose rank the result must check, and that rank.
        unavoidable: A number of BatchNorms that stay under any choice that the rules allow.
        bounds: Clamping nodes whose bounds carry a gauge: the new ones, and a tensor like them.
    """

    eliminated: tuple[Site, ...]
    changes: tuple[Pending, ...]
    records: Mapping[str, FoldRecord]
    guards: Mapping[fx.Node, int]
    unavoidable: int
    bounds: Mapping[fx.Node, tuple[tuple[Tensor | None, Tensor | None], Tensor]]


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every BatchNorm that the rules allow.

    Attributes:
        inputs: Example values of the placeholders; None without any.
        options: What may carry a gauge though it costs something.
    """

    inputs: Sequence[Any] | None = None
    options: Options = field(default_factory=Options)

    def match(self, module: fx.GraphModule, runs: list[Shapes] | None = None) -> Plan:
        """What can be folded, and what keeps the rest. Changes nothing.

        Args:
            module: The inference graph.
            runs: What `shapes_of` gives for it; None to have it derived here.
        """
        walk = _Walk.of(module, runs or shapes_of(module, self.inputs), self.options)
        found = Constraints()
        walk.through(walk.runs, found)
        candidates, refused = _candidates(module.graph, found, walk.runs[0], walk.kept)
        gauges = _solved(walk, found, candidates)
        found, gauges, guards = _guarded(walk, found, gauges, candidates)
        gauges.refused.update(refused)
        constant = _constant_outputs(found, gauges)
        vanished = {site.node for site in gauges.eliminated}
        carries = vanished_into(found, gauges, walk.values)
        done = tuple(
            Pending(
                site, functools.partial(change_of, site, ends, walk.values, dead), carries(site)
            )
            for site in found.sites.values()
            if site.node not in vanished
            and is_changed(ends := Ends.of(site, gauges), dead := constant.get(site.node, {}))
        )
        explanation = Explanation(found, gauges, done)
        records = dict(_records(module, found, gauges, walk.values, explanation))
        stayed = [(s, gauges.refused[s.node]) for s in candidates if s.node not in vanished]
        others = sum(r.verdict == "kept" for r in records.values()) - sum(
            site.kind is Kind.BATCH_NORM for site, _ in stayed
        )
        written = written_out.records(module.graph, found, vanished, explanation)
        records.update(written)
        bounds = {
            node: (new, b.like) for node, b in found.bounds.items() if (new := bounds_of(b, gauges))
        }
        least = others + gauges.bound.unavoidable(stayed)
        least += written_out.unavoidable(module.graph, gauges.bound)
        return Plan(gauges.eliminated, done, records, guards, least, bounds)

    def rewrite(self, module: fx.GraphModule, plan: Plan, *, rounded: bool = True) -> Written:
        """Carry out what `match` found, on `module` itself.

        Args:
            module: The graph that `plan` was made for.
            plan: What to do.
            rounded: Whether new parameters get their stored dtype; otherwise they stay in float64.
        """
        for node, rank in plan.guards.items():
            _guard_rank(module.graph, node, rank)
        return write(module, plan.changes, plan.eliminated, bounds=plan.bounds, rounded=rounded)


@dataclass(frozen=True)
class _Walk:
    """What every way through the graph needs."""

    module: fx.GraphModule
    values: Values
    runs: list[Shapes]
    kept: frozenset[fx.Node]
    options: Options

    @staticmethod
    def of(module: fx.GraphModule, runs: list[Shapes], options: Options) -> _Walk:
        values = Values(module.graph, constants(module))
        return _Walk(module, values, runs, barred(module.graph), options)

    def through(self, runs: Iterable[Shapes], found: Constraints) -> None:
        """Add the demands at the sizes of `runs`."""
        for shapes in runs:
            graph = self.module.graph
            propagate(Walk(graph, shapes, self.values, found, self.kept, self.options))


def _solved(walk: _Walk, found: Constraints, candidates: list[Site]) -> Gauges:
    half = any(p.dtype is torch.float16 for p in walk.module.parameters())
    return Solver(found, candidates, walk.kept, NARROW if half else WIDE).solve()


def _candidates(
    graph: fx.Graph, found: Constraints, shapes: Shapes, kept: frozenset[fx.Node]
) -> tuple[list[Site], dict[fx.Node, Refused]]:
    """Sites that may vanish, BatchNorms first, and why others may not."""
    refused: dict[fx.Node, Refused] = {}
    candidates: list[Site] = []
    views = aliases(graph)
    for site in found.sites.values():
        if site.kind in (Kind.AFFINE, Kind.NORM) or not len(site.s):
            continue
        words = _unremovable(site, shapes, kept, views)
        if words:
            refused[site.node] = Refused("", np.zeros(0, np.int64), words)
        else:
            candidates.append(site)
    candidates.sort(key=lambda site: site.kind is not Kind.BATCH_NORM)
    return candidates, refused


def _unremovable(site: Site, shapes: Shapes, kept: frozenset[fx.Node], views: Aliases) -> str:
    """Why the call cannot give way to its operand even where the two are equal; "" if it can."""
    node, source = site.node, site.source
    assert source is not None
    before, after = shapes.values.get(source), shapes.values.get(node)
    if not is_tensor(after):
        return "the shape of its output is unknown; pass example_inputs"
    if is_tensor(before) and (before.shape != after.shape or before.dtype != after.dtype):
        return "its output has another shape or dtype than its input"
    if node not in kept and source not in kept:
        return ""
    alone = len(readers(source)) == 1 and views.groups[source] == [source]
    if alone and source.op in ("call_function", "call_method"):
        return ""
    return "values that it reads or gives are written in place while others read them"


def _constant_outputs(found: Constraints, gauges: Gauges) -> dict[fx.Node, dict[int, float]]:
    """Channels with s = 0: the layer before gives y' = a_y (t + d_y) there."""
    values: dict[fx.Node, dict[int, float]] = {}
    gone = {site.node for site in gauges.eliminated}
    for site in gauges.eliminated:
        for channel in np.flatnonzero(site.s == 0):
            layer = absorber(found, site, gone)
            assert layer is not None
            label = site.y[channel]
            value = gauges.scale[label] * (site.t[channel] + gauges.shift[label])
            values.setdefault(layer.node, {})[int(channel)] = float(value)
    return values


def _records(
    module: fx.GraphModule,
    found: Constraints,
    gauges: Gauges,
    values: Values,
    explanation: Explanation,
) -> Iterable[tuple[str, FoldRecord]]:
    modules = dict(module.named_modules(remove_duplicate=False))
    vanished = {site.node for site in gauges.eliminated}
    for node in module.graph.nodes:
        if node.op == "call_module":
            for record in _kept_whole(node, modules[str(node.target)]):
                yield f"{node.name}/{record.path}", record
        if not is_norm(node):
            continue
        path, site = norm_path(node), found.sites.get(node)
        if site is not None and node in vanished:
            into = explanation.into(site)
            yield node.name, FoldRecord(path, "folded", into, "" if into else UNCARRIED)
        elif site is not None:
            yield node.name, FoldRecord(path, "kept", (), explanation.reason(site))
        else:
            affine = affine_map_of(node, values)
            words = affine if isinstance(affine, str) else _why_unseen()
            yield node.name, FoldRecord(path, "kept", (), words)


def _why_unseen() -> str:
    return "the shape of its input is unknown without example_inputs; pass them"


def _guarded(
    walk: _Walk, found: Constraints, gauges: Gauges, candidates: list[Site]
) -> tuple[Constraints, Gauges, dict[fx.Node, int]]:
    """Assumed ranks: where others give the same result no guard is needed."""
    guards: dict[fx.Node, int] = {}
    for node, rank in walk.runs[0].assumed.items():
        if not gauges.eliminated or _demanded(node, rank):
            continue
        others = at_other_ranks(walk.module, walk.runs, node)
        wider = found.copy()
        walk.through(others, wider)
        again = _solved(walk, wider, candidates)
        if others and again.eliminated == gauges.eliminated and not _has_shape(found, gauges):
            found, gauges = wider, again
        else:
            guards[node] = rank
    return found, gauges, guards


def _has_shape(found: Constraints, gauges: Gauges) -> bool:
    """Whether the result gets bounds or constants that are laid out for one rank."""
    gone = {site.node for site in gauges.eliminated}
    return any(bounds_of(b, gauges) is not None for b in found.bounds.values()) or any(
        site.kind in (Kind.SCALE, Kind.SHIFT) and is_changed(Ends.of(site, gauges), {})
        for site in found.sites.values()
        if site.node not in gone
    )


def _demanded(start: fx.Node, rank: int) -> bool:
    """Whether a BatchNorm behind `start`, at the same rank, accepts no other."""
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop()
        if node.meta.get(RANKS) == frozenset({rank}):
            return True
        for user in node.users:
            if user not in seen and _keeps_rank(user) and user.args and user.args[0] is node:
                seen.add(user)
                queue.append(user)
    return False


_SAME_RANK = (
    *(Passage.IDENTITY, Passage.RECTIFIER, Passage.MAX_POOL, Passage.AVERAGE_POOL),
    *(Passage.INTERPOLATE, Passage.PAD, Passage.CLAMP, Passage.SOFTMAX),
)


def _keeps_rank(node: fx.Node) -> bool:
    if affine_of(node, {}) is not None or node.target in BATCH_NORM:
        return True
    return passage_of(node) in _SAME_RANK or (
        node.op != "call_module"
        and role_of(node, {}) in (Role.NONLINEARITY, Role.SQUASHING)
        and len(node.all_input_nodes) == 1
    )


def _guard_rank(graph: fx.Graph, node: fx.Node, rank: int) -> None:
    """Where nothing proves the rank, the result checks it when it runs, instead of being wrong."""
    message = (
        f"the BatchNorms folded around {describe(node)} hold for rank {rank} only; fold again with "
        "example_inputs"
    )
    after = node
    while after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        found = graph.call_method("dim", (node,))
    with graph.inserting_after(found):
        fits = graph.call_function(operator.eq, (found, rank))
    with graph.inserting_after(fits):
        graph.call_function(torch._assert, (fits, message))


def _kept_whole(node: fx.Node, module: nn.Module) -> Iterable[FoldRecord]:
    """Records of the BatchNorms inside a module that the graph calls as a whole."""
    for name, inner in module.named_modules():
        if not holds_norm(inner):
            continue
        path = f"{node.target}.{name}" if name else str(node.target)
        why = _why_whole(inner, node, outer=None if inner is module else module)
        yield FoldRecord(path, "kept", (), why)


def _why_whole(norm: nn.Module, node: fx.Node, *, outer: nn.Module | None) -> str:
    if outer is not None:
        inside = f"it lies inside a {type(outer).__name__} that"
        if any(has_hooks(module) for module in outer.modules()):
            return f"{inside} has hooks, which see what goes through it; remove them first"
        cause = node.meta.get(NOT_EXPORTED)
        if cause:
            return f"{inside} cannot be traced, nor does the exporter take the model ({cause})"
        return f"{inside} cannot be traced; pass example_inputs"
    if isinstance(norm, _BatchNorm) and norm.training:
        return "it normalises with batch statistics (train mode); call model.eval() first"
    if isinstance(norm, _BatchNorm) and (norm.running_mean is None or norm.running_var is None):
        return "it has no running statistics, so its scale depends on the batch"
    if has_hooks(norm):
        return "it has hooks, which see its input and output; remove them first"
    return f"{type(norm).__name__} has a forward of its own that cannot be traced"
