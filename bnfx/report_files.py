"""Reports as files; the suffix of the file says in which form."""

from __future__ import annotations

import json
from pathlib import Path

from bnfx.errors import BnfxError
from bnfx.reports import Report


def write_report(report: Report, path: Path) -> None:
    """Write `report` as ".json" or ".txt".

    Raises:
        BnfxError: The suffix is another one, or the file cannot be written.
    """
    check_report_path(path)
    text = json.dumps(report.to_dict(), indent=1) if path.suffix == ".json" else str(report)
    try:
        path.write_text(f"{text}\n")
    except OSError as error:
        raise BnfxError(f"the report cannot be written: {error}") from error


def check_report_path(path: Path) -> None:
    """Refuse a report's path before the work, not after it.

    Raises:
        BnfxError: No report can be written there.
    """
    if path.suffix not in (".json", ".txt"):
        raise BnfxError(f"a report ends in .json or .txt; {path} does not")
    if not path.parent.is_dir():
        raise BnfxError(f"{path.parent} is not a folder; make it before asking for {path}")
