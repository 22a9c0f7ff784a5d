"""Start residual branches at zero: gamma of the last BatchNorm of each branch becomes 0.

Not in the paper of BatchNorm; from Goyal et al. 2017 (arXiv 1706.02677), section 5.1: in a block
y = shortcut(x) + branch(x) whose branch ends with a BatchNorm, gamma = 0 makes the block start as
shortcut(x) + beta. Only a BatchNorm as it was made is changed (gamma 1, mean 0, variance 1,
nothing counted): for any other, a trained or calibrated one, it would throw away what was learned.

In an add, the branch is the side with more affine layers since the two sides parted. The other
side, the shortcut, is the common input or one projection of it; of two longer sides neither is a
shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft, Region
from bnfx.editing.sightings import chosen
from bnfx.graphs.naming import norm_path
from bnfx.operators.calls import function_name
from bnfx.operators.table import Role, affine_of, is_batch_norm, role_of
from bnfx.reports.report import Change

#: Stochastic depth in torchvision and timm: it drops the branch of some examples, or nothing.
_BRANCH_DROPS = frozenset({"stochastic_depth", "drop_path", "StochasticDepth", "DropPath"})


@dataclass(frozen=True)
class Site:
    """The last BatchNorm of a residual branch."""

    path: str


@dataclass(frozen=True)
class ZeroInitResidual:
    """Set gamma of the last BatchNorm of each residual branch to 0.

    Attributes:
        exclude: Glob or globs over module paths to leave alone.
    """

    name: ClassVar[str] = "zero_init_residual"
    preserves: ClassVar[Preserved] = Preserved.STATE_KEYS | Preserved.STATE_VALUES | Preserved.RUNS

    exclude: str | Sequence[str] = ()

    def match(self, draft: Draft) -> list[Site | Change]:
        """One entry for each residual add in what can be traced, in execution order."""
        found: list[Site | Change] = []
        for region in _evidence(draft):
            for node in region.graph.nodes:
                sides = _sides(node, region)
                if sides is not None:
                    found.append(self._look(draft, region, *sides))
        return list({entry.path: entry for entry in found}.values())

    def rewrite(self, draft: Draft, found: Sequence[Site | Change]) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        return tuple(
            entry if isinstance(entry, Change) else self._edit(draft, entry) for entry in found
        )

    def _look(
        self, draft: Draft, region: Region, branch: fx.Node, shortcut: fx.Node
    ) -> Site | Change:
        end = _last(branch, region)
        path = region.name(str(end.target))
        kind = "BatchNorm"

        def kept(reason: str) -> Change:
            return Change(self.name, path, kind, "kept", reason)

        if is_batch_norm(end):
            path = norm_path(end)
        elif end.op != "call_module":
            path = region.caller(end)
            kind = end.name
            return kept("the residual branch ends with an operator, not with a BatchNorm")
        module = draft.root.get_submodule(path)
        kind = type(module).__name__
        if not isinstance(module, _BatchNorm):
            return kept("the residual branch does not end with a BatchNorm")
        if chosen(path, self.exclude):
            return kept("chosen by exclude")
        if _affine_layers(shortcut, branch, region) > 1:
            return kept("both sides of the add hold several affine layers: neither is a shortcut")
        if len(end.users) > 1 or _holders(draft, module) > 1 or _calls(region, end) > 1:
            return kept("its output, its gamma or the module itself is used elsewhere too")
        return kept(reason) if (reason := _not_fresh(module)) else Site(path)

    def _edit(self, draft: Draft, site: Site) -> Change:
        module = draft.root.get_submodule(site.path)
        assert isinstance(module, _BatchNorm)
        with torch.no_grad():
            module.weight.zero_()
        reason = "gamma 0: it ends a residual branch"
        kind = type(module).__name__
        return Change(self.name, site.path, kind, "changed", reason, (f"{site.path}.weight",))


def _evidence(draft: Draft) -> list[Region]:
    """What was seen in a run, as one region without modules; without a run, what can be traced."""
    return draft.regions if draft.seen is None else [draft.seen]


def _sides(node: fx.Node, region: Region) -> tuple[fx.Node, fx.Node] | None:
    """Branch and shortcut of a residual add; None where `node` is none."""
    if role_of(node, region.modules) is not Role.ADD or len(node.all_input_nodes) != 2:
        return None
    a, b = node.all_input_nodes
    if not _ancestors(a) & _ancestors(b):
        return None
    deep = {side: _affine_layers(side, other, region) for side, other in ((a, b), (b, a))}
    if deep[a] == deep[b]:
        return None  # two projections, or none: a sum, not a branch beside a shortcut
    return (a, b) if deep[a] > deep[b] else (b, a)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and all that it is computed from, parameters read by name apart."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        value = queue.pop()
        if value in seen or value.op == "get_attr":
            continue
        seen.add(value)
        queue.extend(value.all_input_nodes)
    return seen


def _affine_layers(side: fx.Node, other: fx.Node, region: Region) -> int:
    """How many affine layers lie on `side` since it parted from `other`."""
    own = _ancestors(side) - _ancestors(other)
    modules = region.modules
    return sum(affine_of(node, modules) is not None for node in own)


def _last(branch: fx.Node, region: Region) -> fx.Node:
    """The operator that ends the branch, seen through shape-only operators and drops."""
    modules = region.modules

    def passes(node: fx.Node) -> bool:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        name = type(module).__name__ if module is not None else function_name(node.target)
        return role_of(node, modules) is Role.MOVE or name in _BRANCH_DROPS

    while passes(branch) and len(branch.users) == 1:
        branch = branch.all_input_nodes[0]
    return branch


def _calls(region: Region, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(n.op == "call_module" and n.target == node.target for n in region.graph.nodes)
    path = norm_path(node)
    return sum(is_batch_norm(n) and norm_path(n) == path for n in region.graph.nodes)


def _holders(draft: Draft, norm: _BatchNorm) -> int:
    """How many slots hold the module, or another module with the same gamma."""
    gammas = (other._parameters.get("weight") for _, other in draft.modules())
    return sum(gamma is norm.weight for gamma in gammas if gamma is not None)


def _not_fresh(norm: _BatchNorm) -> str:
    """Why a BatchNorm is not as it was made; "" if it is."""
    if not norm.affine:
        return "it has no gamma"
    if norm.weight.is_meta:
        return "it is on the meta device, which holds no values to tell whether it is fresh"
    if bool((norm.weight == 0).all()):
        return "its gamma is 0 already"
    if not bool((norm.weight == 1).all()):
        return "its gamma is not 1 any more: trained, or inserted as an identity or calibrated"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics that would show whether it has been trained"
    counted = norm.num_batches_tracked is not None and int(norm.num_batches_tracked) > 0
    if counted or not bool((norm.running_mean == 0).all() & (norm.running_var == 1).all()):
        return "it has statistics already: it was trained or calibrated"
    return ""
