"""What each kind of report says first, and which pictures go with it."""

from __future__ import annotations

from bnfx.document import Document, Section, Table, blocks
from bnfx.reports import Report


def document_of(report: Report, extra: tuple[Section, ...] = ()) -> Document:
    """The report as a document, with further sections behind its own."""
    found = tuple(blocks(report))
    first = next((block.caption for block in found if isinstance(block, Table)), "")
    own = Section("Report", found)
    return Document(f"bnfx {type(report).__name__}", "neutral", first, (), (own, *extra))
