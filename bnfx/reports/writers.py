"""Documents as Markdown, as one self-contained HTML file and as JSON."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any

from bnfx.reports.document import Block, Document, Headline, Paragraph, Picture, Table
from bnfx.text import harmless, printable
from bnfx.version import __version__

_WORDS = {"good": "Passed.", "bad": "Failed.", "warning": "Attention.", "neutral": ""}


def to_markdown(document: Document) -> str:
    """GitHub's Markdown; pictures are left to the HTML."""
    head = document.headline
    verdict = f"{_WORDS[head.status]} {head.verdict}".strip()
    lines = [f"# {_escape(head.title)}", "", f"**{_escape(verdict)}**", ""]
    lines += [f"* {_escape(name)}: {_escape(value)}" for name, value in head.facts]
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
    flat = printable(" ".join(text.split()))
    flat = flat.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", flat)


def to_html(document: Document) -> str:
    """One HTML file: style and pictures inside, nothing to load, every text escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    # Built by `bnfx.reports.drawing`, where every text is escaped.
    environment.filters["svg"] = Markup
    source = resources.files("bnfx.reports").joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        head=document.headline,
        sections=document.sections,
        word=_WORDS[document.headline.status],
        version=__version__,
        time=datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def to_fragment(head: Headline, shown: Iterable[Block]) -> str:
    """The verdict and what stands below as HTML inside another page, whose style it takes."""
    from markupsafe import escape

    def text(tag: str, content: str) -> str:
        lines = str(escape(printable(content))).replace("\n", "<br>")
        return f"<{tag}>{lines}</{tag}>"

    parts = [text("strong", f"{_WORDS[head.status]} {head.verdict}".strip())]
    for block in shown:
        if isinstance(block, Paragraph):
            parts.append(text("p", block.text))
        elif isinstance(block, Table):
            rows = [(("th", block.columns)), *(("td", row) for row in block.rows)]
            drawn = ("".join(text(tag, cell) for cell in cells) for tag, cells in rows)
            body = "".join(f"<tr>{row}</tr>" for row in drawn)
            caption = text("caption", block.caption) if block.caption else ""
            parts.append(f"<table>{caption}{body}</table>")
    return f"<div>{''.join(parts)}</div>"


def to_json(content: Mapping[str, Any]) -> str:
    """JSON by the standard, which knows no NaN: numbers that are not finite become strings."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
    return "".join(c if harmless(c) else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
