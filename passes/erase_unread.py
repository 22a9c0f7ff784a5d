"""Erase what nothing reads: it is no part of what a network computes, and must not tie gauges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from bnfx.editing.declarations import Preserved
from bnfx.editing.inference_draft import InferenceDraft
from bnfx.gauges.written_out import UNREAD
from bnfx.graphs.constants import is_pure
from bnfx.graphs.naming import norm_path
from bnfx.graphs.norms import is_norm
from bnfx.reports.report import Change


@dataclass(frozen=True)
class EraseUnread:
    """Erase the calls that nothing reads and that do nothing else.

    Modules that are kept whole, random and unknown functions, and writers stay.
    """

    name: ClassVar[str] = "erase_unread"
    preserves: ClassVar[Preserved] = Preserved.SIGNATURE | Preserved.STATE_VALUES

    def match(self, draft: InferenceDraft) -> list[fx.Node]:
        """The unread calls, and the names that they alone read; the last ones first."""
        unread: dict[fx.Node, None] = {}
        for node in reversed(draft.graph.nodes):
            erasable = node.op == "get_attr" or is_pure(node)
            if erasable and all(user in unread for user in node.users):
                unread[node] = None
        return list(unread)

    def rewrite(self, draft: InferenceDraft, found: Sequence[fx.Node]) -> tuple[Change, ...]:
        """Erase what `match` found."""
        gone = tuple(
            Change(self.name, norm_path(node), "batch_norm", "changed", UNREAD, at=node.name)
            for node in found
            if is_norm(node)
        )
        for node in found:
            draft.graph.erase_node(node)
        return gone
