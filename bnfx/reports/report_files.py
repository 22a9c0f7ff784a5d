"""Reports as files; the suffix of the file says in which form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfx.errors import BnfxError
from bnfx.reports.report import Report

if TYPE_CHECKING:
    from bnfx.reports.document import Picture

SUFFIXES = (".json", ".txt", ".md", ".html")


def write_report(
    report: Report, path: Path, graphs: Callable[[], Sequence[Picture]] | None = None
) -> None:
    """Write `report` as ".json", ".txt", ".md" or ".html".

    Args:
        report: The report.
        path: The file; its suffix decides.
        graphs: What draws the graph around each BatchNorm, for ".html".

    Raises:
        BnfxError: The suffix is another one, or the file cannot be written.
    """
    check_report_path(path)
    forms: dict[str, Callable[[], str]] = {
        ".json": lambda: to_json(report.to_dict()),
        ".txt": lambda: str(report),
        ".md": report.to_markdown,
        ".html": lambda: to_html(report, graphs() if graphs is not None else ()),
    }
    text = forms[path.suffix]().rstrip("\n")
    try:
        path.write_bytes(f"{text}\n".encode(errors="replace"))
    except OSError as error:
        raise BnfxError(f"the report cannot be written: {error}") from error


def check_report_path(path: Path) -> None:
    """Refuse a report's path before the work, not after it.

    Raises:
        BnfxError: No report can be written there.
    """
    if path.suffix not in SUFFIXES:
        raise BnfxError(f"a report ends in {', '.join(SUFFIXES)}; {path} does not")
    if not path.parent.is_dir():
        raise BnfxError(f"{path.parent} is not a folder; make it before asking for {path}")


def to_html(report: Report, graphs: Sequence[Picture] = (), more: Sequence[Report] = ()) -> str:
    """`report.to_html()` with pictures of the graph around each BatchNorm, and more reports."""
    from bnfx.reports import report_text
    from bnfx.reports.report_documents import document_of

    return report_text.to_html(document_of(report, tuple(graphs), tuple(more)))


def to_markdown(report: Report, more: Sequence[Report] = ()) -> str:
    """`report.to_markdown()` with more reports."""
    from bnfx.reports import report_text
    from bnfx.reports.report_documents import document_of

    return report_text.to_markdown(document_of(report, (), tuple(more)))


def to_json(content: Mapping[str, Any]) -> str:
    """JSON by the standard, which knows no NaN: numbers that are not finite become strings."""
    return json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
