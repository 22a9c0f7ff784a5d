"""Remove local response normalisation: section 4.2.1, "Remove Local Response Normalization".

LRN divides each value by (k + alpha / size * sum of squares over neighbouring channels)^beta. Batch
normalisation takes its place. Outputs change, parameters do not: LRN has none. Edited are
`nn.LocalResponseNorm` and `nn.CrossMapLRN2d` in their slot, in any model, and
`F.local_response_norm` where the model or the part around it can be traced symbolically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import fx, nn

from bnfx.editing.declarations import Preserved
from bnfx.editing.draft import Draft, argument
from bnfx.editing.driver import OPTIONAL, OUT_OF_REACH, chosen, unseen_calls
from bnfx.graphs.examples import has_hooks
from bnfx.reports.report import Change

_KINDS = (nn.LocalResponseNorm, nn.CrossMapLRN2d)


@dataclass(frozen=True)
class ModuleSite:
    """A module to take out of its slot."""

    path: str


@dataclass(frozen=True)
class CallSite:
    """A functional call to take out of the graph of the root."""

    node: fx.Node
    path: str


@dataclass(frozen=True)
class RemoveLocalResponseNorm:
    """Remove every local response normalisation.

    Attributes:
        exclude: Glob or globs over module paths to leave alone.
    """

    name: ClassVar[str] = "remove_lrn"
    preserves: ClassVar[Preserved] = Preserved.STATE_KEYS | Preserved.STATE_VALUES | Preserved.RUNS

    exclude: str | Sequence[str] = ()

    def match(self, draft: Draft) -> list[ModuleSite | CallSite | Change]:
        """Modules in the order of the model, then functional calls."""
        found: list[ModuleSite | CallSite | Change] = []
        for path, module in draft.modules():
            if _is_known(module):
                reason = self._why_not(path, module)
                kind = type(module).__name__
                found.append(self._kept(path, kind, reason) if reason else ModuleSite(path))
        for region in draft.regions:
            for node in region.graph.nodes:
                if node.target is not F.local_response_norm:
                    continue
                path = region.caller(node)
                reason = "chosen by exclude" if chosen(path, self.exclude) else ""
                if not region.fixed and not reason:
                    reason = OPTIONAL
                kept = self._kept(path, "local_response_norm", reason)
                found.append(kept if reason else CallSite(node, path))
        rest = unseen_calls(
            draft, self.name, {"local_response_norm"}, _is_known, found, lambda _: OUT_OF_REACH
        )
        return [*found, *rest]

    def rewrite(
        self, draft: Draft, found: Sequence[ModuleSite | CallSite | Change]
    ) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        return tuple(
            entry if isinstance(entry, Change) else self._edit(draft, entry) for entry in found
        )

    def _why_not(self, path: str, module: nn.Module) -> str:
        if chosen(path, self.exclude):
            return "chosen by exclude"
        if not path:
            return "it is the model itself"
        if has_hooks(module):
            return "it has hooks, which would be lost; remove them first"
        return ""

    def _kept(self, path: str, kind: str, reason: str) -> Change:
        return Change(self.name, path, kind, "kept", reason)

    def _edit(self, draft: Draft, site: ModuleSite | CallSite) -> Change:
        if isinstance(site, CallSite):
            draft.bypass(site.node, argument(site.node, 0, "input", None))
            return Change(self.name, site.path, "local_response_norm", "changed", "removed")
        module = draft.root.get_submodule(site.path)
        draft.replace(site.path, nn.Identity().train(module.training))
        return Change(self.name, site.path, type(module).__name__, "changed", "removed")


def _is_known(module: nn.Module) -> bool:
    """A module of torch.nn; a subclass with a forward of its own is code like any other."""
    return isinstance(module, _KINDS) and type(module).forward.__module__.startswith("torch.nn")
