"""An inference graph under edit: what is known of its values, and what was written into it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bnfx.editing.declarations import GraphFacts, Preserved
from bnfx.graphs.boxes import boxes
from bnfx.graphs.constants import Values
from bnfx.graphs.in_place import barred, freshen, restore
from bnfx.graphs.inference import Captured
from bnfx.graphs.naming import owner_of
from bnfx.graphs.parameters import Written, attribute, constants, free_name, set_tensor
from bnfx.graphs.shapes import EXACT, Shapes, shapes_of
from bnfx.graphs.spelling import spell_norms
from bnfx.graphs.tracing import assemble
from bnfx.operators.effects import name_inplace_flag
from bnfx.reports.report import Change

#: Kind of a change that is no BatchNorm's.
MERGE = "merge"


class InferenceDraft:
    """The graph of a model in its present mode, under edit.

    In-place calls are fresh ones here wherever that is the same; `finish` puts them back.
    """

    #: Calls, with parameters and buffers at their original names.
    module: fx.GraphModule
    #: Example values of the placeholders; None without any.
    inputs: Sequence[Any] | None
    #: Such values of other sizes; None where these are to be tried.
    others: Sequence[Sequence[Any]] | None
    #: Whether new tensors stay in float64 until the end, because more is to be written.
    exact: bool
    #: What passes wrote.
    written: Written
    #: What passes did and left, by the name of the node; a later record takes the place.
    changes: dict[str, Change]
    #: Layers that became one, and what else moved for the sake of speed, in the order of the work.
    merges: tuple[Change, ...]
    #: A number of BatchNorms that is proved to stay, whatever is chosen under the rules.
    unavoidable: int
    #: In-place calls of the model that `finish` had to leave fresh.
    fresh: Sequence[fx.Node] = ()
    _seen: Shapes | None

    def __init__(self, captured: Captured, *, exact: bool = False) -> None:
        self.module, self.inputs, self.exact = captured.module, captured.inputs, exact
        self.others = captured.others
        self.written, self._new, self.changes, self.merges = Written(), Written(), {}, ()
        self.unavoidable, self._seen = 0, None
        self.drawn = boxes(self.module)
        spell_norms(self.graph)
        for node in self.graph.nodes:
            name_inplace_flag(node)
        self._in_place = freshen(self.graph, barred(self.graph))
        self._count = len(self.graph.nodes)
        self._order = {node.name: at for at, node in enumerate(self.graph.nodes)}

    @property
    def graph(self) -> fx.Graph:
        """The graph of `module`."""
        return self.module.graph

    @cached_property
    def runs(self) -> list[Shapes]:
        """Shapes of all values, for one size of input, and for a second one where that runs."""
        found = shapes_of(self.module, self.inputs, self.others)
        self._seen = found[0]
        return found

    @property
    def shapes(self) -> Shapes:
        """Shapes of all calls, without another look where every call was seen: none changes."""
        seen = self._seen
        if seen is not None and all(n in seen.values for n in self.graph.nodes if "call" in n.op):
            return seen
        return self.runs[0]

    @cached_property
    def values(self) -> Values:
        """What is computed from parameters alone."""
        return Values(self.graph, constants(self.module))

    @cached_property
    def barred(self) -> frozenset[fx.Node]:
        """Nodes whose values must stay, because they share memory with what is written."""
        return barred(self.graph)

    def copy(self) -> InferenceDraft:
        """Another draft of the same graph, to go back to; tensors are shared."""
        other = copy.copy(self)
        other._seen = None
        other._forget()
        other.module = assemble(self.module, copy.deepcopy(self.graph))
        other.module.meta.update(self.module.meta)
        other.written, other._new = self.written.copy(), self._new.copy()
        other.changes = dict(self.changes)
        return other

    def put_merged(
        self,
        like: str,
        parts: Mapping[str, Tensor],
        *,
        sources: tuple[str, ...],
        gone: Collection[fx.Node],
    ) -> dict[str, str]:
        """Store what calls that go become, beside the layer that has the weight `like`.

        The names are those of a layer of its own: under the old one's, the weight would load into
        the model that has the parts, and mean something else there. What was merged before, and is
        read by calls that go alone, gives its name away.
        """
        path = f"{owner_of(like).removesuffix('.merged')}.merged"
        free: dict[str, bool] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            read = all(user in gone for user in node.users)
            free[str(node.target)] = free.get(str(node.target), True) and read
        return {
            part: self.put(name, value, like=like, sources=sources, over=free.get(name, False))
            for part, value in parts.items()
            for name in [f"{path}.{part}"]
        }

    def put(
        self, wanted: str, value: Tensor, *, like: str, sources: tuple[str, ...], over: bool = False
    ) -> str:
        """Store a parameter in float64, to be rounded as the parameter `like` is; its name.

        Where something else has the name wanted, it gives way (`over`), or another one is taken.
        """
        stored = attribute(self.module, like)
        assert isinstance(stored, Tensor)
        name = wanted if over else free_name(self.module, wanted)
        set_tensor(self.module, name, value.to(stored.device), trained=stored.requires_grad)
        self._new.provenance[name] = sources
        known = self.written.dtypes | self._new.dtypes
        self._new.dtypes[name] = known.get(like, stored.dtype)
        return name

    def put_back(self, name: str, value: Tensor, *, sources: tuple[str, ...]) -> None:
        """Store another value, perhaps of another shape, where a parameter or buffer was."""
        old = attribute(self.module, name)
        assert isinstance(old, Tensor)
        buffer = not isinstance(old, nn.Parameter)
        set_tensor(
            self.module, name, value.to(old.device), trained=old.requires_grad, buffer=buffer
        )
        self._new.provenance[name] = sources
        self._new.dtypes[name] = self.written.dtypes.get(name, old.dtype)
        self._seen = None

    def demand_rank(self, node: fx.Node, rank: int, what: str) -> None:
        """Where nothing proves the rank, the result checks it when it runs: `what` needs that."""
        message = f"{what} hold for rank {rank} only; fold again with example_inputs"
        after = node
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            found = self.graph.call_method("dim", (node,))
        with self.graph.inserting_after(found):
            fits = self.graph.call_function(operator.eq, (found, rank))
        with self.graph.inserting_after(fits):
            self.graph.call_function(torch._assert, (fits, message))

    def note(self, new: Written) -> None:
        """Take up what was written into `module`."""
        self._new.provenance.update(new.provenance)
        self._new.dtypes.update(new.dtypes)

    def picture(self) -> str:
        """The graph as text."""
        return str(self.graph)

    def facts(self, _declared: Preserved) -> GraphFacts:
        """What passes may be bound to preserve, as it is now: all of it costs little."""
        [out] = self.graph.find_nodes(op="output")
        names = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        return GraphFacts(
            inputs=tuple(str(node.target) for node in self.graph.find_nodes(op="placeholder")),
            outputs=pytree.tree_structure(out.args),
            tensors={name: attribute(self.module, name) for name in names},
            named=frozenset(self.written.dtypes),
        )

    def settle(self, changes: Sequence[Change]) -> None:
        """Take up what a pass did; what was known of the graph before holds no longer."""
        merges = tuple(change for change in changes if change.kind == MERGE)
        self.changes.update({c.at: c for c in changes if c.kind != MERGE})
        self.merges += merges
        count = len(self.graph.nodes)
        if count == self._count and not self._new.dtypes and not merges:
            return
        self.graph.lint()
        self.written.add(self._new)
        self._new, self._count = Written(), count
        self.module.meta[EXACT] = dict(self.written.dtypes)
        self._forget()

    def _forget(self) -> None:
        for known in ("runs", "values", "barred"):
            self.__dict__.pop(known, None)

    def finish(self) -> fx.GraphModule:
        """The edited graph, in-place where that is safe still."""
        self.fresh = restore(self.graph, self._in_place)
        return assemble(self.module, self.graph)

    def let_go(self, kept: nn.Module) -> None:
        """Hold no tensors any more, but what `kept` has: a cycle of nodes would, for a while."""
        theirs = {id(module) for module in kept.modules()}
        self._forget()
        for module in self.module.modules():
            if id(module) not in theirs:
                module._parameters.clear()
                module._buffers.clear()

    def in_order(self) -> list[Change]:
        """The records, in the order in which the model evaluates."""
        last = len(self._order)  # of calls that passes made
        names = {at: at.partition("/")[0] for at in self.changes}
        return sorted(self.changes.values(), key=lambda c: self._order.get(names[c.at], last))
