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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.editing.declarations import Preserved
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.gauges import written_out
from bnfx.gauges.constraints import Kind, Site
from bnfx.gauges.explanation import UNCARRIED, Explanation, vanished_into
from bnfx.gauges.new_weights import Ends, Pending, bounds_of, change_of, is_changed
from bnfx.gauges.slots import Slots
from bnfx.gauges.solution import Problem, Solution, solve
from bnfx.gauges.walk import FoldOptions
from bnfx.gauges.writing import write
from bnfx.graphs.constants import Values
from bnfx.graphs.examples import has_hooks
from bnfx.graphs.inference import NOT_EXPORTED
from bnfx.graphs.naming import describe, norm_path
from bnfx.graphs.norms import affine_map_of, holds_norm, is_norm
from bnfx.operators.calls import call_name
from bnfx.operators.table import Passage, passage_of
from bnfx.reports.report import Change

_ARITHMETIC = (Passage.ADD, Passage.SUBTRACT, Passage.MULTIPLY, Passage.DIVIDE)


@dataclass(frozen=True)
class Folding:
    """All that is done to a graph: the calls that vanish share one solution."""

    #: Calls that vanish, in order.
    eliminated: tuple[Site, ...]
    #: New parameters, computed when they are written.
    pending: tuple[Pending, ...]
    #: Nodes whose rank the result must check, and that rank.
    guards: Mapping[fx.Node, int]
    #: Clamping nodes whose bounds carry a gauge: the new ones, and a tensor like them.
    bounds: Mapping[fx.Node, tuple[tuple[Tensor | None, Tensor | None], Tensor]]
    #: A number of BatchNorms that stay under any choice that the rules allow.
    unavoidable: int
    #: The records of the BatchNorms that vanish.
    records: tuple[Change, ...]


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold every BatchNorm that the rules allow.

    Attributes:
        options: What may carry a gauge though it costs something.
        slots: The modules that are to take up what is solved; None for the graph alone.
    """

    name: ClassVar[str] = "fold_bn"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    options: FoldOptions = field(default_factory=FoldOptions)
    slots: Slots | None = None

    def match(self, draft: InferenceDraft) -> list[Folding | Change]:
        """What can be folded, as one site, and what keeps the rest."""
        if not self.concerns(draft):
            kept = self._kept_inside(draft)
            return [Folding((), (), {}, {}, len(kept), ()), *kept] if kept else []
        values, solution = draft.values, self._solved(draft)
        found, gauges, vanished = solution.found, solution.gauges, solution.vanished
        if self.slots is not None:
            self.slots.settle(found, gauges)
        constant, carries = solution.constant_outputs(), vanished_into(found, gauges, values)
        pending = tuple(
            Pending(site, functools.partial(change_of, site, ends, values, dead), carries(site))
            for site in found.sites.values()
            if site.node not in vanished
            and is_changed(site, ends := Ends.of(site, gauges), dead := constant.get(site.node, {}))
        )
        explanation = Explanation(found, gauges, pending)
        records = {c.at: c for c in self._records(draft, solution, explanation)}
        unavoidable = _unavoidable(draft.graph, solution, records.values())
        written = written_out.records(draft.graph, found, set(vanished), explanation)
        records |= {c.at: c for c in written}
        bounds = {
            node: (new, b.like) for node, b in found.bounds.items() if (new := bounds_of(b, gauges))
        }
        gone = tuple(c for c in records.values() if c.action == "changed")
        kept = [c for c in records.values() if c.action == "kept"]
        return [
            Folding(gauges.eliminated, pending, solution.guards, bounds, unavoidable, gone),
            *kept,
        ]

    def concerns(self, draft: InferenceDraft) -> bool:
        """Whether the graph calls a BatchNorm by itself, or maps channels as one does.

        Files have BatchNorms that are written as a product and a sum with constants, and a forward
        may normalise its input.
        """
        return any(
            is_norm(node) or written_out.part_of(node) or _is_map(node, draft.values)
            for node in draft.graph.nodes
        )

    def finds_any(self, draft: InferenceDraft) -> bool:
        """Whether a BatchNorm would vanish."""
        solved = self._solved(draft) if self.concerns(draft) else None
        return solved is not None and any(map(is_norm, solved.vanished))

    def _solved(self, draft: InferenceDraft) -> Solution:
        barred = draft.barred
        return solve(
            Problem(draft.module, draft.runs, draft.values, barred, self.options, self.slots)
        )

    def rewrite(
        self, draft: InferenceDraft, found: Sequence[Folding | Change]
    ) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        done: list[Change] = []
        for entry in found:
            if isinstance(entry, Change):
                done.append(entry)
                continue
            for node, rank in entry.guards.items():
                draft.demand_rank(node, rank, f"the BatchNorms folded around {describe(node)}")
            draft.note(
                write(
                    draft.module,
                    entry.pending,
                    entry.eliminated,
                    bounds=entry.bounds,
                    rounded=not draft.exact,
                )
            )
            draft.unavoidable = entry.unavoidable
            done += entry.records
        return tuple(done)

    def _records(
        self, draft: InferenceDraft, solution: Solution, explanation: Explanation
    ) -> Iterator[Change]:
        """One record for each evaluation of a BatchNorm that is a call of its own."""
        yield from self._kept_inside(draft)
        for node in draft.graph.nodes:
            if not is_norm(node):
                continue
            site = solution.found.sites.get(node)
            if site is not None and node in solution.vanished:
                into = explanation.into(site)
                path, why = norm_path(node), "" if into else UNCARRIED
                yield Change(self.name, path, "batch_norm", "changed", why, into=into, at=node.name)
                continue
            affine = affine_map_of(node, draft.values)
            if site is not None:
                why = explanation.reason(site)
            elif isinstance(affine, str):
                why = affine
            else:
                why = "the shape of its input is unknown without example_inputs; pass them"
            yield self._kept(norm_path(node), why, node.name)

    def _kept_inside(self, draft: InferenceDraft) -> list[Change]:
        """Records of the BatchNorms in what the graph runs as a whole."""
        modules = dict(draft.module.named_modules(remove_duplicate=False))
        found: list[Change] = []
        for node in draft.graph.nodes:
            if node.op == "call_module":
                found += self._kept_whole(node, modules[str(node.target)])
            if node.op == "get_attr" and node.target in modules:
                found += self._kept_in_part(node, modules[str(node.target)])
        return found

    def _kept_whole(self, node: fx.Node, module: nn.Module) -> Iterator[Change]:
        """Records of the BatchNorms inside a module that the graph calls as a whole."""
        for name, inner in module.named_modules():
            if not holds_norm(inner):
                continue
            path = f"{node.target}.{name}" if name else str(node.target)
            why = _why_whole(inner, node, outer=None if inner is module else module)
            yield self._kept(path, why, f"{node.name}/{path}")

    def _kept_in_part(self, node: fx.Node, part: nn.Module) -> Iterator[Change]:
        """Records of the BatchNorms in a part of the graph that an operator runs as a whole."""
        callers = ", ".join(dict.fromkeys(call_name(user) for user in node.users))
        why = f"it lies inside a part that {callers} runs as a whole"
        for inner in part.modules():
            for norm in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
                if is_norm(norm):
                    yield self._kept(norm_path(norm), why, f"{node.name}/{norm.name}")

    def _kept(self, path: str, why: str, at: str) -> Change:
        return Change(self.name, path, "batch_norm", "kept", why, at=at)


def _unavoidable(graph: fx.Graph, solution: Solution, records: Iterable[Change]) -> int:
    """A number of BatchNorms that is proved to stay: those that no rule is about, all of them."""
    bound, refused = solution.gauges.bound, solution.gauges.refused
    stayed = [(s, refused[s.node]) for s in solution.candidates if s.node not in solution.vanished]
    others = sum(c.action == "kept" for c in records) - sum(
        site.kind is Kind.BATCH_NORM for site, _ in stayed
    )
    return others + bound.unavoidable(stayed) + written_out.unavoidable(graph, bound)


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


def _is_map(node: fx.Node, values: Values) -> bool:
    """Whether a call scales or shifts by a number, or by one for each channel.

    A constant of more axes, such as an embedding of positions, is no map of channels.
    """
    if passage_of(node) not in _ARITHMETIC or values.is_constant(node):
        return False
    known = (values.operand(value) for value in node.args)
    return any(
        value is not None and max(value.shape, default=1) == value.numel() for value in known
    )
