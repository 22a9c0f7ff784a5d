"""What comes from a file or a model is shown, and does nothing to whatever shows it."""

from __future__ import annotations

import json
import unicodedata

import pytest

import bnfx
from bnfx.errors import UsageError
from bnfx.reports.report import FoldRecord, FoldReport
from bnfx.reports.writers import to_json
from bnfx.text import printable

EVIL = "evil\x1b[2J\x1b]0;owned\x07\r\x08\x7f\x9b31m\u202egpj.exe\u2066\u2028\ud800\uffff"


def acting(text: str) -> set[str]:
    """Characters that a terminal or a browser would obey."""
    found = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    return found - {"\n", "\t"}


def test_what_reads_as_text_stays_as_it_is() -> None:
    for text in ("conv.weight", "Größe 模型 émoji 🙂", "two\nlines\tand\u00a0spaces\u3000"):
        assert printable(text) is text or printable(text) == text
    assert printable("\x1b[2J") == r"\x1b[2J"
    assert acting(EVIL)
    assert not acting(printable(EVIL))
    assert printable(printable(EVIL)) == printable(EVIL)


def test_every_form_of_a_report_shows_it_and_no_more() -> None:
    report = FoldReport((FoldRecord(EVIL, "kept", (EVIL,), EVIL),), {})
    for text in (str(report), report.to_markdown(), report.to_html(), to_json(report.to_dict())):
        assert not acting(text)
        assert "evil" in text
    assert json.loads(to_json(report.to_dict()))["batch_norms"][0]["path"] == EVIL


@pytest.mark.parametrize("kind", [bnfx.FoldError, bnfx.VerificationError, UsageError])
def test_so_does_an_error(kind: type[Exception]) -> None:
    error = kind(f"layer {EVIL} cannot be folded")
    assert not acting(str(error))
    assert r"evil\x1b[2J" in str(error)
