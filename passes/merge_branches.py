"""Merge convolutions and identities of one input that are added into one convolution.

All of these are linear in x and so is their sum (Ding et al., "RepVGG", 2021, section 3.3):

    y = W1 * x + b1 + s (W2 * x) + t + k x + c        W = W1 + [s W2] + [diag k]

where [.] lays a smaller kernel into the largest one with their centres aligned, an identity being
a 1 x 1 kernel, and a grouped kernel into a denser one. Strides must be equal and output sizes
agree at every input size. A BatchNorm behind a branch, or instead of one, is the factor s and the
summand t. A kernel never grows, so a depthwise kernel goes into a dense one only where it fits.

The sum is kept in float64 until folding has written its own changes, and is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from bnfx.editing.declarations import Preserved
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.editing.sums import alone, does_nothing, is_inner, is_sum, operands_of, repoint
from bnfx.graphs.mapped import outside_heap
from bnfx.graphs.naming import norm_path, owner_of
from bnfx.graphs.norms import affine_map_of, is_norm
from bnfx.graphs.parameters import sweep
from bnfx.graphs.shapes import is_tensor
from bnfx.operators.calls import argument, given_arguments
from bnfx.operators.convolution import Branch, absorbed, joined
from bnfx.operators.table import Passage, affine_of, layer_call, passage_of
from bnfx.reports.report import Change


@dataclass(frozen=True, eq=False)
class Leaf:
    """One operand of a sum, as a branch of `source`."""

    #: The operand.
    value: object
    #: What the branch reads.
    source: fx.Node | None = None
    #: The linear map; None where the operand is none.
    branch: Branch | None = None
    #: The convolution in it, if there is one.
    layer: fx.Node | None = None
    #: BatchNorms in it.
    norms: tuple[fx.Node, ...] = ()
    #: Parameters and buffers that went in.
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A sum in which some operands become one convolution."""

    #: The outermost addition.
    root: fx.Node
    #: Operands that stay.
    rest: tuple[object, ...]
    #: Operands that are merged.
    merged: tuple[Leaf, ...]
    #: The convolution that takes them up.
    layer: fx.Node
    #: Its new weight and bias, float64.
    branch: Branch


@dataclass(frozen=True)
class MergeBranches:
    """Merge parallel linear branches wherever that is exact."""

    name: ClassVar[str] = "merge_branches"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    def match(self, draft: InferenceDraft) -> list[Site]:
        """Sums whose branches can be merged; of the others there is nothing to say."""
        sums = [node for node in draft.graph.nodes if is_sum(node) and not is_inner(node)]
        look = _Look(draft) if sums else None
        found = (look.at(node) for node in sums if look is not None)
        return [site for site in found if site is not None]

    def rewrite(self, draft: InferenceDraft, found: Sequence[Site]) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        gone: list[Change] = []
        instead: dict[object, fx.Node] = {}
        for site in found:
            rest = [instead.get(operand, operand) for operand in site.rest]
            instead[site.root], weight = _rewrite(draft, site, rest)
            into = (owner_of(weight),)
            for norm in (norm for leaf in site.merged for norm in leaf.norms):
                path, at = norm_path(norm), norm.name
                gone.append(Change(self.name, path, "batch_norm", "changed", "", into=into, at=at))
        return tuple(gone)


class _Look:
    def __init__(self, draft: InferenceDraft) -> None:
        self.shapes, self.values, self.kept = draft.shapes, draft.values, draft.barred

    def at(self, root: fx.Node) -> Site | None:
        """The merge with the densest layer that takes up another operand, if there is one."""
        shape, operands = self._shape(root), list(operands_of(root))
        if shape is None or not self.kept.isdisjoint((root, *_nodes(operands))):
            return None
        if not _meet(operands):
            return None
        leaves = [self._leaf(operand, shape) for operand in operands]
        layers = [
            (leaf, leaf.layer, leaf.branch)
            for leaf in leaves
            if leaf.layer is not None and leaf.branch is not None and leaf.source not in self.kept
        ]
        layers.sort(key=lambda found: (found[2].groups, -found[2].taps))
        for target, layer, branch in layers:
            merged = [target]
            for leaf in leaves:
                wider = self._with(branch, target, leaf) if leaf is not target else None
                if wider is not None:
                    merged.append(leaf)
                    branch = wider
            if sum(leaf.branch is not None for leaf in merged) > 1:
                rest = tuple(leaf.value for leaf in leaves if leaf not in merged)
                done = tuple(replace(leaf, branch=None) for leaf in merged)  # none is held on to
                branch = replace(branch, weight=outside_heap(branch.weight))
                return Site(root, rest, done, layer, branch)
        return None

    def _with(self, branch: Branch, target: Leaf, leaf: Leaf) -> Branch | None:
        if leaf.branch is not None:
            return joined(branch, leaf.branch) if leaf.source is target.source else None
        known = self.values.operand(leaf.value)
        return None if known is None else absorbed(branch, known)

    def _leaf(self, value: object, shape: tuple[int, ...]) -> Leaf:
        if not isinstance(value, fx.Node) or self.values.is_constant(value):
            return Leaf(value, names=self.values.sources(value))
        return self._branch(value, shape) if self._shape(value) == shape else Leaf(value)

    def _branch(self, value: fx.Node, shape: tuple[int, ...]) -> Leaf:
        """`value` as a linear map of the nearest tensor before it that others may read too."""
        found = None
        if not alone(value) or value in self.kept:
            pass
        elif affine_of(value) is not None:
            found = self._layer(value, shape)
        elif is_norm(value):
            found = self._normed(value, shape)
        elif passage_of(value) is Passage.IDENTITY and does_nothing(value):
            inner = value.args[0]
            if isinstance(inner, fx.Node) and self._same(inner, value):
                found = replace(self._branch(inner, shape), value=value)
        elif passage_of(value) is Passage.MULTIPLY:
            found = self._scaled(value, shape)
        return found or Leaf(value, value, Branch.identity(shape, 1))

    def _layer(self, value: fx.Node, shape: tuple[int, ...]) -> Leaf | None:
        """A layer whose weight is read by name, not computed."""
        row, call = affine_of(value), layer_call(value)
        assert row is not None
        weight, bias = self.values.of(call["weight"]), self.values.of(call["bias"])
        named = isinstance(call["weight"], fx.Node) and call["weight"].op == "get_attr"
        unknown = weight is None or (bias is None and call["bias"] is not None)
        if row.transposed or unknown or not named:
            return None
        branch = Branch.of_layer(row, call, weight, bias)
        if branch is None or len(shape) != branch.rank:
            return None
        names = self.values.sources(call["weight"]) + self.values.sources(call["bias"])
        return Leaf(value, call["input"], branch, value, names=names)

    def _normed(self, value: fx.Node, shape: tuple[int, ...]) -> Leaf | None:
        affine, source = affine_map_of(value, self.values), argument(value, 0, "input")
        if isinstance(affine, str) or not isinstance(source, fx.Node) or len(shape) < 2:
            return None
        s, t = torch.from_numpy(affine.s), torch.from_numpy(affine.t)
        leaf = self._after(value, self._inside(source, shape), s, t)
        return leaf and replace(leaf, norms=(*leaf.norms, value))

    def _scaled(self, value: fx.Node, shape: tuple[int, ...]) -> Leaf | None:
        a, b = argument(value, 0, "input"), argument(value, 1, "other")
        for source, constant in ((a, b), (b, a)):
            known = self.values.operand(constant)
            if known is None or not isinstance(source, fx.Node) or self._shape(source) != shape:
                continue
            leaf = self._inside(source, shape)
            factor = leaf.branch.per_channel(known) if leaf.branch is not None else None
            if factor is not None:
                return self._after(value, leaf, factor, torch.zeros_like(factor))
        return None

    def _inside(self, source: fx.Node, shape: tuple[int, ...]) -> Leaf:
        if alone(source) and self._shape(source) == shape:
            return self._branch(source, shape)
        return Leaf(source, source, Branch.identity(shape, 1))

    def _after(self, value: fx.Node, leaf: Leaf, s: Tensor, t: Tensor) -> Leaf | None:
        """The branch `leaf`, and y -> s y + t behind it, which `value` computes."""
        if leaf.branch is None or leaf.branch.outputs != len(s):
            return None
        names = tuple(name for n in value.all_input_nodes for name in self.values.sources(n))
        branch = leaf.branch.scaled(s, t)
        return replace(leaf, value=value, branch=branch, names=leaf.names + names)

    def _same(self, a: fx.Node, b: fx.Node) -> bool:
        x, y = self.shapes.values.get(a), self.shapes.values.get(b)
        return is_tensor(x) and is_tensor(y) and x.shape == y.shape and x.dtype == y.dtype

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        value = self.shapes.values.get(node)
        if not is_tensor(value) or not value.is_floating_point():
            return None
        return tuple(int(n) for n in value.shape)


def _nodes(operands: Iterable[object]) -> list[fx.Node]:
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _meet(operands: Iterable[object]) -> bool:
    """Whether two operands may be branches of one tensor; asked before a weight is copied."""
    seen: set[fx.Node] = set()
    for operand in _nodes(operands):
        behind = _behind(operand)
        if seen & behind:
            return True
        seen |= behind
    return False


def _behind(value: fx.Node) -> set[fx.Node]:
    """`value` and all that may lie before it in a branch."""
    seen, queue = {value}, [value]
    while queue:
        node = queue.pop()
        passed = passage_of(node) in (Passage.IDENTITY, Passage.MULTIPLY)
        if passed or affine_of(node) is not None or is_norm(node):
            queue += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return seen


def _rewrite(draft: InferenceDraft, site: Site, rest: Sequence[Any]) -> tuple[fx.Node, str]:
    """Put the convolution in. The node that has the sum's value now, and its weight's name."""
    graph, layer = draft.graph, site.layer
    row = affine_of(layer)
    assert row is not None
    call = layer_call(layer)
    weight = str(call["weight"].target)
    sources = tuple(dict.fromkeys(name for leaf in site.merged for name in leaf.names))
    parts = {"weight": site.branch.weight, "bias": site.branch.bias}
    gone = [leaf.layer for leaf in site.merged if leaf.layer is not None]
    names = draft.put_merged(weight, parts, sources=sources, gone=gone)
    with graph.inserting_before(site.root):
        new = {part: graph.get_attr(name) for part, name in names.items()}
        named = given_arguments(layer) | new
        source = named.pop("input")
        assert isinstance(source, fx.Node)
        total = graph.call_function(layer.target, (source,), named)  # type: ignore[arg-type]  # a function
        total.meta = dict(layer.meta)
        for operand in rest:
            total = graph.call_function(torch.add, (total, operand))
            total.meta = dict(site.root.meta)
    for leaf in site.merged:
        repoint(leaf.value, source)
    site.root.replace_all_uses_with(total)
    sweep([site.root])
    return total, names["weight"]
