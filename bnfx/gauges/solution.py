"""The gauges of a graph, solved under the shapes that are known or assumed.

Without example inputs ranks are assumed where a layer fixes them (`bnfx.graphs.shapes`). Where
other ranks give the same gauges, these hold for all; otherwise the result must check the rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from bnfx.gauges.choice import Gauges, Solver
from bnfx.gauges.constraints import CONSTANTS, Constraints, Kind, Site
from bnfx.gauges.elimination import Refused, absorber
from bnfx.gauges.new_weights import Ends, bounds_of, is_changed
from bnfx.gauges.ranges import HALF, beyond_range
from bnfx.gauges.rank import of_same_rank
from bnfx.gauges.rules import propagate
from bnfx.gauges.slots import Slots
from bnfx.gauges.soundness import NARROW, WIDE
from bnfx.gauges.walk import FoldOptions, Walk
from bnfx.graphs.constants import Values, readers
from bnfx.graphs.in_place import Aliases, aliases
from bnfx.graphs.shapes import EXACT, Shapes, at_other_ranks, is_tensor
from bnfx.graphs.tracing import RANKS

#: Why values must stay.
WRITTEN = "values that are written in place while others read them"
_SEEN = "values that hooks or other code of the model's own may see"


@dataclass(frozen=True)
class Problem:
    """A graph to solve."""

    module: fx.GraphModule
    #: Shapes for one size of input, and for a second one where that runs.
    runs: Sequence[Shapes]
    values: Values
    #: Nodes whose values must stay.
    barred: frozenset[fx.Node]
    options: FoldOptions
    #: What modules can take up, where that is to be done with them; None for the graph alone.
    slots: Slots | None = None

    def demands(self, runs: Iterable[Shapes], found: Constraints) -> Constraints:
        """`found` with the demands at the sizes of `runs`."""
        fixed = dict.fromkeys(self.barred, WRITTEN)
        if self.slots is not None:
            fixed = dict.fromkeys(self.slots.held, _SEEN) | fixed
        watched = () if self.slots is None else self.slots.borders
        for shapes in runs:
            graph = self.module.graph
            propagate(Walk(graph, shapes, self.values, found, fixed, self.options, watched))
        if self.slots is not None:
            self.slots.demand(found)
        return found


@dataclass(frozen=True)
class Solution:
    """Which calls vanish, and the gauges for that."""

    found: Constraints
    gauges: Gauges
    #: Calls that might have vanished, BatchNorms first.
    candidates: list[Site]
    #: Nodes whose rank the result must check, and that rank.
    guards: Mapping[fx.Node, int]

    @functools.cached_property
    def vanished(self) -> frozenset[fx.Node]:
        """The calls that give way to their operand."""
        return frozenset(site.node for site in self.gauges.eliminated)

    def constant_outputs(self) -> dict[fx.Node, dict[int, float]]:
        """Channels with s = 0: the layer before gives y' = a_y (t + d_y) there."""
        values: dict[fx.Node, dict[int, float]] = {}
        for site in self.gauges.eliminated:
            channels = self.gauges.backward(site)
            if not len(channels):
                continue
            layer = absorber(self.found, site, self.vanished)
            assert layer is not None
            for channel in channels:
                label = site.y[channel]
                value = self.gauges.scale[label] * (site.t[channel] + self.gauges.shift[label])
                values.setdefault(layer.node, {})[int(channel)] = float(value)
        return values

    def needs_rank(self) -> bool:
        """Whether the result gets bounds or constants that are laid out for one rank."""
        gauges, gone = self.gauges, self.vanished
        return any(bounds_of(b, gauges) is not None for b in self.found.bounds.values()) or any(
            site.kind in CONSTANTS and is_changed(site, Ends.of(site, gauges), {})
            for site in self.found.sites.values()
            if site.node not in gone
        )


def solve(problem: Problem) -> Solution:
    """The best gauges that the rules allow."""
    found = problem.demands(problem.runs, Constraints())
    candidates, refused = _candidates(problem, found)
    while True:
        solution = Solution(found, _gauges(problem, found, candidates), candidates, {})
        solution = _guarded(problem, solution)
        beyond = _beyond_range(problem, solution)
        if problem.slots is not None:
            beyond |= problem.slots.incomplete(solution.vanished)
        if not beyond:
            solution.gauges.refused.update(refused)
            return solution
        refused |= beyond
        candidates = [site for site in candidates if site.node not in beyond]


def _beyond_range(problem: Problem, solution: Solution) -> dict[fx.Node, Refused]:
    exact, known = problem.module.meta.get(EXACT, {}), problem.values.known.tensors
    dtypes = {name: exact.get(name, tensor.dtype) for name, tensor in known.items()}
    if not solution.vanished or not {*dtypes.values()} & {*HALF}:
        return {}
    dead = solution.constant_outputs()
    first, values = problem.runs[0], problem.values
    return beyond_range(dtypes, first, values, solution.found, solution.gauges, dead)


def _gauges(problem: Problem, found: Constraints, candidates: list[Site]) -> Gauges:
    half = any(p.dtype is torch.float16 for p in problem.module.parameters())
    return Solver(found, candidates, problem.barred, NARROW if half else WIDE).solve()


def _candidates(problem: Problem, found: Constraints) -> tuple[list[Site], dict[fx.Node, Refused]]:
    """Sites that may vanish, BatchNorms first, and why others may not."""
    refused: dict[fx.Node, Refused] = {}
    candidates: list[Site] = []
    views = aliases(problem.module.graph)
    for site in found.sites.values():
        if not len(site.s):
            continue
        words = _unremovable(site, problem, views)
        if words:
            refused[site.node] = Refused("", np.zeros(0, np.int64), words)
        else:
            candidates.append(site)
    candidates.sort(key=lambda site: site.kind is not Kind.BATCH_NORM)
    return candidates, refused


def _unremovable(site: Site, problem: Problem, views: Aliases) -> str:
    """Why the call cannot give way to its operand even where the two are equal; "" if it can."""
    node, source = site.node, site.source
    assert source is not None
    if problem.slots is not None and (why := problem.slots.why_kept(node)):
        return why
    if not is_tensor(problem.runs[0].values.get(node)):
        return "the shape of its output is unknown; pass example_inputs"
    if _reshapes(site, problem.runs[0]):
        return "its output has another shape or dtype than its input"
    if node not in problem.barred and source not in problem.barred:
        return ""
    alone = len(readers(source)) == 1 and views.groups[source] == [source]
    if alone and source.op in ("call_function", "call_method"):
        return ""
    return "values that it reads or gives are written in place while others read them"


def _reshapes(site: Site, shapes: Shapes) -> bool:
    """Whether what the call gives differs in shape or dtype from the operand that would replace it.

    A constant of higher rank makes it so.
    """
    assert site.source is not None
    before, after = shapes.values.get(site.source), shapes.values.get(site.node)
    if not is_tensor(before) or not is_tensor(after):
        return False
    return before.shape != after.shape or before.dtype != after.dtype


def _guarded(problem: Problem, solution: Solution) -> Solution:
    """Assumed ranks: where others give the same result no guard is needed."""
    guards: dict[fx.Node, int] = {}
    if problem.slots is not None:
        problem.slots.ranks.clear()
    for node, rank in problem.runs[0].assumed.items():
        if not solution.gauges.eliminated or demanded(node, rank):
            continue
        others = at_other_ranks(problem.module, problem.runs, node)
        wider = problem.demands(others, solution.found.copy())
        again = _gauges(problem, wider, solution.candidates)
        same = again.eliminated == solution.gauges.eliminated
        same = same and not any(_reshapes(s, run) for s in again.eliminated for run in others)
        if others and same and not solution.needs_rank():
            solution = Solution(wider, again, solution.candidates, {})
        elif problem.slots is None or problem.slots.checks(node, rank, solution.vanished):
            guards[node] = rank
        else:  # a module cannot check it: then nothing may depend on it
            return Solution(wider, _gauges(problem, wider, []), solution.candidates, {})
    return Solution(solution.found, solution.gauges, solution.candidates, guards)


def demanded(start: fx.Node, rank: int) -> bool:
    """Whether a BatchNorm behind `start`, at the same rank, accepts no other."""
    return any(node.meta.get(RANKS) == frozenset({rank}) for node in of_same_rank(start))
