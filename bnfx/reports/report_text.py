"""Documents as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from importlib import resources

from bnfx.reports.document import Block, Document, Paragraph, Picture
from bnfx.version import __version__

_WORDS = {"good": "Passed.", "bad": "Failed.", "warning": "Attention.", "neutral": ""}


def to_markdown(document: Document) -> str:
    """GitHub's Markdown; pictures are left to the HTML."""
    lines = [f"# {_escape(document.title)}", ""]
    verdict = f"{_WORDS[document.status]} {document.verdict}".strip()
    lines += [f"**{_escape(verdict)}**", ""]
    lines += [f"* {_escape(name)}: {_escape(value)}" for name, value in document.facts]
    for section in document.sections:
        lines += ["", f"## {_escape(section.heading)}"]
        for block in section.blocks:
            lines += _markdown(block)
    return "\n".join(lines) + "\n"


def _markdown(block: Block) -> Iterator[str]:
    if isinstance(block, Picture):
        return
    yield ""
    if isinstance(block, Paragraph):
        yield from (f"{_escape(line)}  " for line in block.text.splitlines())
        return
    if block.caption:
        yield from (f"{_escape(line)}  " for line in block.caption.splitlines())
        yield ""
    yield _row(block.columns)
    yield "|" + " --- |" * len(block.columns)
    yield from map(_row, block.rows)


def _row(cells: tuple[str, ...]) -> str:
    return "".join(f"| {_escape(cell)} " for cell in cells) + "|"


def _escape(text: str) -> str:
    """As Markdown that reads as `text`, on one line; HTML in it is text too."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", flat)


def to_html(document: Document) -> str:
    """One HTML file: style and pictures inside, nothing to load, every text escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["svg"] = (
        Markup  # built by `bnfx.reports.drawing`, where every text is escaped
    )
    source = (
        resources.files("bnfx.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    now = datetime.datetime.now(tz=datetime.UTC)
    return environment.from_string(source).render(
        document=document,
        word=_WORDS[document.status],
        version=__version__,
        time=now.strftime("%Y-%m-%d %H:%M UTC"),
    )
