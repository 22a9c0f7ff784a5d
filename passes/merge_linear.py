"""Merge linear maps in sequence, and such sequences beside each other, where that costs less.

A convolution behind a convolution is one, W = W2 * W1 and b = b2 + sum W2 b1, if and only if the
second pads nothing, or b1 = 0 and the first pads all that its kernel reaches over
(`bnfx.operators.geometry`). So are linear layers, average pools that count what they pad, zero
padding, and maps of each channel. Chains of one tensor that are added become one kernel (Ding et
al., "Diverse Branch Block", 2021), which may grow.

Two layers may be narrow in the middle, and one large kernel costs more than two small ones. So a
merge is made only where

    sum over layers of  places * taps * up(out) * up(in) / groups

falls, `up` rounding widths to what the target computes at once; and of all merges that overlap, the
one that saves most. An average pool behind a convolution of size one comes first where that is
cheaper: the two commute, bias included, where the weights of each window sum to one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from bnfx.editing.declarations import Preserved
from bnfx.editing.inference_draft import MERGE, InferenceDraft
from bnfx.editing.linear_chains import Chain, Chains, averaged
from bnfx.editing.sums import alone, asks_rank, is_inner, is_sum, operands_of, sums_in
from bnfx.graphs.naming import norm_path, owner_of
from bnfx.graphs.norms import is_norm
from bnfx.graphs.parameters import sweep
from bnfx.graphs.shapes import Shapes, is_tensor
from bnfx.onnx_files.node_call import RESIZED, VALUE
from bnfx.operators.calls import argument, given_arguments
from bnfx.operators.convolution import Branch
from bnfx.operators.geometry import Geometry
from bnfx.operators.table import Passage, affine_of, layer_call, passage_of, product_of
from bnfx.reports.report import Change

#: Of so many operands of a sum all sets are tried.
_MOST = 6


@dataclass(frozen=True, eq=False)
class Site:
    """A value that becomes one layer, beside what stays of a sum."""

    root: fx.Node
    chain: Chain
    #: Operands of the sum `root` that stay.
    rest: tuple[object, ...]
    #: What all of it costs, and what the one layer does.
    before: float
    after: float
    #: Weight and bias, float64; computed when the site is chosen.
    branch: Branch | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The calls that go."""
        return self.chain.nodes

    @property
    def inputs(self) -> tuple[object, ...]:
        """What is read still."""
        return (self.chain.source, *self.rest)


@dataclass(frozen=True, eq=False)
class Swap:
    """An average over space that comes before the layer of size one that it stands behind."""

    root: fx.Node
    layer: fx.Node
    source: fx.Node
    before: float
    after: float

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The calls that go."""
        return (self.root, self.layer)

    @property
    def inputs(self) -> tuple[object, ...]:
        """What is read still."""
        return (self.source,)


@dataclass(frozen=True)
class MergeLinear:
    """Merge linear maps wherever that is exact and costs less."""

    name: ClassVar[str] = "merge_linear"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    #: The width that the target rounds to.
    block: int = 16
    #: Whether maps that are added become one, too.
    branches: bool = True

    def match(self, draft: InferenceDraft) -> list[Site | Swap]:
        """The merges that save most, none of which overlaps; of the others is nothing to say."""
        built = (
            site if isinstance(site, Swap) else replace(site, branch=site.chain.build())
            for site in self.sites(draft)
        )
        return [site for site in built if isinstance(site, Swap) or _survives(draft, site)]

    def sites(self, draft: InferenceDraft) -> list[Site | Swap]:
        """The same, before weights are computed."""
        roots: dict[int, list[fx.Node]] = {}
        for node in draft.graph.nodes:
            spatial = _spatial(node) if _ends(node) else None
            if spatial is not None:
                roots.setdefault(spatial, []).append(node)
        if not any(map(_linked, itertools.chain.from_iterable(roots.values()))):
            return []
        found: list[Site | Swap] = []
        for spatial, nodes in roots.items():
            chains = Chains(draft, spatial, sums=self.branches)
            costs = _Costs(draft, chains, self.block)
            for node in nodes:
                found += self._at(chains, costs, node)
        return _apart(sorted(found, key=lambda site: site.after - site.before))

    def rewrite(self, draft: InferenceDraft, found: Sequence[Site | Swap]) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        done: list[Change] = []
        for site in found:
            if isinstance(site, Swap):
                done.append(_swap(draft, site, self.name))
            else:
                done += _merge(draft, site, self.name)
        return tuple(done)

    def _at(self, chains: Chains, costs: _Costs, root: fx.Node) -> Iterator[Site | Swap]:
        if root in chains.barred or not chains.is_value(root):
            return
        yield from costs.swap(root)
        for chain in chains.of(root):
            if chain.steps > 1:
                yield from costs.site(root, chain)
        if self.branches and is_sum(root):
            yield from _parts(chains, costs, root)


def _parts(chains: Chains, costs: _Costs, root: fx.Node) -> Iterator[Site]:
    """Sites in which some operands of a sum become one, and the others stay."""
    operands, shape = list(operands_of(root)), chains.shape(root)
    data = [o for o in operands if isinstance(o, fx.Node) and chains.shape(o) == shape]
    read = [o for o in operands if isinstance(o, fx.Node)]
    if not chains.barred.isdisjoint((*sums_in(root), *read)):
        return
    if shape is None or len(operands) != len(set(operands)) or len(data) < 2:
        return
    found = {node: {c.source: c for c in chains.before(node)} for node in data}
    for source in dict.fromkeys(s for known in found.values() for s in known):
        able = [node for node in data if source in found[node]]
        for count in range(2, min(len(able), _MOST) + 1):
            for chosen in itertools.combinations(able[:_MOST], count):
                whole: Chain | None = found[chosen[0]][source]
                for node in chosen[1:]:
                    whole = whole and whole.beside(found[node][source])
                if whole is None:
                    continue
                rest = tuple(operand for operand in operands if operand not in chosen)
                nodes = (*sums_in(root), *whole.nodes)
                yield from costs.site(root, replace(whole, nodes=nodes), rest)


class _Costs:
    """What calls cost, at the sizes of the example; without one, in sizes that are certain."""

    def __init__(self, draft: InferenceDraft, chains: Chains, block: int) -> None:
        self.chains, self.block, self.draft = chains, block, draft
        self.certain = draft.inputs is not None

    def site(self, root: fx.Node, chain: Chain, rest: tuple[object, ...] = ()) -> Iterator[Site]:
        """The merge, if it costs less at all sizes that were seen."""
        if not chain.layers or not self._one_dtype(root, chain):
            return
        first = chain.source.op == "placeholder"
        totals = []
        for run in self.draft.runs:  # only now: they take time
            places = self._places(run, root, root)
            before = sum(self._cost(run, node, root) for node in chain.nodes)
            after = chain.geometry.cost(places, self.block, first=first)
            after += sum(self._cost(run, root, root) for _ in rest)
            totals.append((before, after))
        if all(after < before for before, after in totals):
            yield Site(root, chain, rest, *totals[0])

    def swap(self, root: fx.Node) -> Iterator[Swap]:
        """An average behind a layer of size one, if it costs less before it."""
        chains, layer = self.chains, argument(root, 0, "input")
        sums = averaged(root, spatial=chains.spatial) if chains.spatial else None
        if sums is None or not isinstance(layer, fx.Node) or affine_of(layer) is None:
            return
        step = chains.step(layer)
        if step is None or layer in chains.barred or not alone(layer):
            return
        g = step.geometry
        one = {1} >= {*g.kernel, *g.stride} and not any(g.padding)
        if not one or (g.shifted and not sums) or not chains.of(step.input):
            return
        totals = []
        for run in self.draft.runs:
            wide, narrow = (self._places(run, node, root) for node in (layer, root))
            inputs = Geometry.window(g.inputs, g.kernel).cost(wide, self.block, first=False)
            outputs = Geometry.window(g.outputs, g.kernel).cost(wide, self.block, first=False)
            first = _from_input(step.input)
            before = g.cost(wide, self.block, first=first) + outputs
            totals.append((before, g.cost(narrow, self.block, first=first) + inputs))
        if all(after < before for before, after in totals):
            yield Swap(root, layer, step.input, *totals[0])

    def _cost(self, run: Shapes, node: fx.Node, root: fx.Node) -> float:
        step = self.chains.step(node)
        if step is None:  # a sum of two
            width = self._width(run, node)
            geometry = Geometry.window(width, (1,) * self.chains.spatial)
        else:
            geometry = step.geometry
        first = step is not None and _from_input(step.input)
        return geometry.cost(self._places(run, node, root), self.block, first=first)

    def _places(self, run: Shapes, node: fx.Node, root: fx.Node) -> float:
        """How many outputs a channel has; without an example, whole ones for each of root's."""
        own, theirs = (self._elements(run, n) / self._width(run, n) for n in (node, root))
        return own if self.certain else own // theirs

    def _elements(self, run: Shapes, node: fx.Node) -> float:
        value = run.values.get(node)
        return float(value.numel()) if is_tensor(value) else math.nan

    def _width(self, run: Shapes, node: fx.Node) -> int:
        value = run.values.get(node)
        axis = 1 if self.chains.spatial else -1
        return int(value.shape[axis]) or 1 if is_tensor(value) else 1

    def _one_dtype(self, root: fx.Node, chain: Chain) -> bool:
        nodes = (root, chain.source, *chain.nodes)
        values = [self.draft.shapes.values.get(node) for node in nodes]
        return len({(value.dtype, value.device) for value in values if is_tensor(value)}) == 1


def _ends(node: fx.Node) -> bool:
    """Whether a chain may end here: behind a layer, a pool, or a sum that is no part of another."""
    if affine_of(node) is not None or product_of(node) is not None:
        return True
    if passage_of(node) in (Passage.AVERAGE_POOL, Passage.MEAN):
        return True
    return is_sum(node) and not is_inner(node)


def _spatial(root: fx.Node) -> int | None:
    """How many axes lie behind the channels, where a layer near the end of the chains tells."""
    queue = [root]
    for node in queue:
        row = affine_of(node)
        if row is not None:
            return row.spatial or 0
        if product_of(node) is not None:
            return 0
        passes = is_norm(node) or passage_of(node) in (
            Passage.ADD,
            Passage.MULTIPLY,
            Passage.IDENTITY,
            Passage.AVERAGE_POOL,
            Passage.MEAN,
        )
        if passes and len(queue) < 4 * _MOST:
            queue += [n for n in node.all_input_nodes if n.op.startswith("call")]
    return None


def _linked(node: fx.Node) -> bool:
    """Whether what the call reads comes from another step, or is read by several."""
    return any(
        n.op.startswith("call") and (_passes(n) or len(n.users) > 1) for n in node.all_input_nodes
    )


def _passes(node: fx.Node) -> bool:
    known = affine_of(node) is not None or product_of(node) is not None or is_norm(node)
    return known or passage_of(node) in (
        Passage.ADD,
        Passage.SUBTRACT,
        Passage.MULTIPLY,
        Passage.DIVIDE,
        Passage.NEGATE,
        Passage.IDENTITY,
        Passage.AVERAGE_POOL,
        Passage.PAD,
    )


def _from_input(node: fx.Node) -> bool:
    while passage_of(node) in (Passage.PAD, Passage.IDENTITY) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _apart(sites: Iterable[Site | Swap]) -> list[Site | Swap]:
    """The first of all sites that share a call, or of which one reads what the other takes."""
    gone: set[fx.Node] = set()
    read: set[object] = set()
    chosen: list[Site | Swap] = []
    for site in sites:
        if gone.isdisjoint((*site.nodes, *site.inputs)) and read.isdisjoint(site.nodes):
            chosen.append(site)
            gone.update(site.nodes)
            read.update(site.inputs)
    return chosen


def _survives(draft: InferenceDraft, site: Site) -> bool:
    """Whether the weights can be stored as the layer's are: products of small ones may vanish."""
    dtype = draft.shapes.values[site.root].dtype
    assert site.branch is not None
    for rows in (site.branch.weight.flatten(1), site.branch.bias[:, None]):
        error = (rows.to(dtype).double() - rows).norm(dim=1)
        if not bool((error <= torch.finfo(dtype).eps * rows.norm(dim=1)).all()):
            return False
    return True


def _merge(draft: InferenceDraft, site: Site, by: str) -> Iterator[Change]:
    """Put the layer in, and tell."""
    chain, root = site.chain, site.root
    assert site.branch is not None
    layer = chain.layers[0]
    like = draft.values.sources(layer_call(layer)["weight"])
    weights = {"weight": site.branch.weight}
    if chain.geometry.shifted or layer_call(layer)["bias"] is not None:
        weights["bias"] = site.branch.bias
    sources = tuple(dict.fromkeys(chain.names))
    names = draft.put_merged(like[0], weights, sources=sources, gone=chain.nodes)
    into = owner_of(names["weight"])
    with draft.graph.inserting_before(root):
        parts = {part: draft.graph.get_attr(name) for part, name in names.items()}
        total = _call(draft.graph, layer, chain, parts)
        total.meta = dict(layer.meta) | {k: root.meta[k] for k in ("val", VALUE) if k in root.meta}
        total.meta[RESIZED] = True
        for operand in site.rest:
            total = draft.graph.call_function(torch.add, (total, operand))  # type: ignore[arg-type]
            total.meta = dict(root.meta)
    for node in chain.nodes:
        for user in [user for user in node.users if asks_rank(user)]:
            user.replace_input_with(node, chain.source)
    for norm in filter(is_norm, chain.nodes):
        yield Change(by, norm_path(norm), "batch_norm", "changed", "", into=(into,), at=norm.name)
    parts_of = {change.into[0]: change.values for change in draft.merges if change.values}
    owners = map(owner_of, sources)
    layers = tuple(dict.fromkeys(n for name in owners for n in parts_of.get(name, (name,))))
    why = _share(site)
    yield Change(by, into, MERGE, "changed", why, values=layers, into=(into,), at=root.name)
    root.replace_all_uses_with(total)
    sweep([root])


def _swap(draft: InferenceDraft, site: Swap, by: str) -> Change:
    """Put the average before the layer, and tell."""
    graph, root, layer = draft.graph, site.root, site.layer
    with graph.inserting_before(root):
        pooled = graph.node_copy(root, lambda n: site.source if n is layer else n)
        total = graph.node_copy(layer, lambda n: pooled if n is site.source else n)
    pooled.meta = {key: value for key, value in root.meta.items() if key != "val"}
    total.meta = dict(layer.meta) | {k: root.meta[k] for k in ("val", VALUE) if k in root.meta}
    for user in [user for user in layer.users if asks_rank(user)]:
        user.replace_input_with(layer, site.source)
    path = owner_of(draft.values.sources(layer_call(layer)["weight"])[0])
    why = f"the average behind it comes before it: {_share(site)}"
    root.replace_all_uses_with(total)
    sweep([root])
    return Change(by, path, MERGE, "changed", why, values=(path,), into=(path,), at=root.name)


def _share(site: Site | Swap) -> str:
    return f"costs {site.after / site.before:.2f} of what they did"


def _call(graph: fx.Graph, layer: fx.Node, chain: Chain, parts: dict[str, fx.Node]) -> fx.Node:
    """The one layer, spelled as `layer` is."""
    geometry, target, source = chain.geometry, layer.target, chain.source
    if not geometry.kernel:
        if affine_of(layer) is None:
            overload = isinstance(target, torch._ops.OpOverload)
            target = torch.ops.aten.linear.default if overload else F.linear
        return graph.call_function(target, (source,), parts)  # type: ignore[arg-type]  # a function
    sizes: dict[str, Any] = {
        "stride": list(geometry.stride),
        "padding": list(geometry.padding),
        "dilation": list(geometry.dilation),
        "groups": geometry.groups,
    }
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket.default  # another one takes padding as a word
    named = given_arguments(layer) | {"bias": None} | parts | sizes
    named.pop("input")
    return graph.call_function(target, (source,), named)  # type: ignore[arg-type]  # a function
