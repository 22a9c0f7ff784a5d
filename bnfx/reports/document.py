"""A report as a document, before it becomes Markdown or HTML: a verdict, facts, sections of blocks.

The tables are those that a report draws with `rich`, so that a column which is added there appears
here without further work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group
from rich.protocol import rich_cast
from rich.table import Table as RichTable
from rich.text import Text as RichText

Status = Literal["good", "bad", "warning", "neutral"]
#: Names and values of the numbers that matter most.
Facts = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Paragraph:
    """Lines of text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of text; each row is as long as `columns`."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A drawing, and the words for those who do not see it."""

    title: str
    #: What is to be seen in it.
    description: str
    #: An SVG element, built by `bnfx.reports.drawing`, which escapes every text.
    svg: str
    #: Whether it is shown at once; otherwise its title is, and opens it.
    is_open: bool = True


Block = Paragraph | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Headline:
    """What a report says first."""

    #: What the report is about.
    title: str
    #: Whether it is good news.
    status: Status
    #: The news, in a sentence.
    verdict: str
    facts: Facts = ()


@dataclass(frozen=True)
class Document:
    """A report to be read."""

    headline: Headline
    sections: tuple[Section, ...]


def blocks(drawn: Any) -> Iterator[Paragraph | Table]:
    """What `rich` would draw, as paragraphs and tables."""
    drawn = rich_cast(drawn)
    if isinstance(drawn, Group):
        for part in drawn.renderables:
            yield from blocks(part)
    elif isinstance(drawn, RichTable):
        columns = tuple(_text(column.header) for column in drawn.columns)
        cells = [[_text(cell) for cell in column.cells] for column in drawn.columns]
        yield Table(_text(drawn.title), columns, tuple(zip(*cells, strict=True)))
    else:
        yield Paragraph(_text(drawn))


def _text(drawn: Any) -> str:
    if drawn is None:
        return ""
    return drawn.plain if isinstance(drawn, RichText) else str(drawn)
