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
from bnfx.editing.sightings import OPTIONAL, chosen, is_stock, unseen_calls
from bnfx.graphs.examples import has_hooks
from bnfx.reports.report import Change

_KINDS = (nn.LocalResponseNorm, nn.CrossMapLRN2d)
_FUNCTION = "local_response_norm"


@dataclass(frozen=True)
class Site:
    """A module to take out of its slot, or a call to take out of a graph."""

    path: str
    kind: str
    call: fx.Node | None = None


@dataclass(frozen=True)
class RemoveLocalResponseNorm:
    """Remove every local response normalisation."""

    name: ClassVar[str] = "remove_lrn"
    preserves: ClassVar[Preserved] = Preserved.STATE_KEYS | Preserved.STATE_VALUES | Preserved.RUNS

    #: Glob or globs over module paths to leave alone.
    exclude: str | Sequence[str] = ()

    def match(self, draft: Draft) -> list[Site | Change]:
        """Modules in the order of the model, then functional calls."""
        found = [
            self._look(Site(path, type(module).__name__), self._why_not(path, module))
            for path, module in draft.modules()
            if is_stock(module, _KINDS)
        ]
        for region in draft.regions:
            for node in region.graph.find_nodes(op="call_function", target=F.local_response_norm):
                path = region.caller(node)
                left = "" if region.fixed else OPTIONAL
                reason = "chosen by exclude" if chosen(path, self.exclude) else left
                found.append(self._look(Site(path, _FUNCTION, node), reason))
        return [*found, *unseen_calls(draft, self.name, {_FUNCTION}, _KINDS, found)]

    def rewrite(self, draft: Draft, found: Sequence[Site | Change]) -> tuple[Change, ...]:
        """Carry out what `match` found."""
        return tuple(e if isinstance(e, Change) else self._edit(draft, e) for e in found)

    def _look(self, site: Site, reason: str) -> Site | Change:
        return Change(self.name, site.path, site.kind, "kept", reason) if reason else site

    def _why_not(self, path: str, module: nn.Module) -> str:
        if chosen(path, self.exclude):
            return "chosen by exclude"
        if not path:
            return "it is the model itself"
        if has_hooks(module):
            return "it has hooks, which would be lost; remove them first"
        return ""

    def _edit(self, draft: Draft, site: Site) -> Change:
        if site.call is not None:
            draft.bypass(site.call, argument(site.call, 0, "input", None))
        else:
            training = draft.root.get_submodule(site.path).training
            draft.replace(site.path, nn.Identity().train(training))
        return Change(self.name, site.path, site.kind, "changed", "removed")
