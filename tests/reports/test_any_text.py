"""Reports of any text and any numbers are well-formed, inside their frame, and lose nothing."""

from __future__ import annotations

import itertools
import json
import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnfx.reports.drawing import Bar, Dot, bars, dots, shorten, ticks
from bnfx.reports.report import FoldRecord, FoldReport, InsertRecord, InsertReport
from bnfx.reports.writers import to_json

_SOME = settings(max_examples=60, deadline=None)
#: Markup, control characters, halves of surrogates and ends of lines among the rest.
TEXT = st.text(st.one_of(st.characters(), st.sampled_from("|\\`*_<>&\"'\x00\x1b\r\n\ud800\ufffe")))
NUMBERS = st.one_of(
    st.floats(0, 1e30), st.sampled_from([0.0, 5e-324, 1e-300, 1.0, 1.7e308, math.inf, math.nan])
)


def drawn(svg: str) -> ET.Element:
    """The picture, which can be stored and holds no number that is none."""
    root = ET.fromstring(svg.encode("utf-8"))
    width, height = (float(part) for part in str(root.get("viewBox")).split()[2:])
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx", "width"):
            value = element.get(name)
            assert value is None or -1 <= float(value) <= width + 1, (name, value)
        for name in ("y", "y1", "y2", "cy", "height"):
            value = element.get(name)
            assert value is None or -1 <= float(value) <= height + 1, (name, value)
        assert "nan" not in (element.get("d") or "")
    return root


@_SOME
@example([("a", 5e-324, 0.0)])
@example([("a", 1.7e308, 0.0)])
@given(st.lists(st.tuples(TEXT, NUMBERS, NUMBERS), max_size=4))
def test_bars_stay_inside(rows: list[tuple[str, float, float]]) -> None:
    root = drawn(bars("t", "d", [Bar(name, v, v, v + w, name) for name, v, w in rows], "ms"))
    assert len([*root.iter("rect")]) == len(rows)


@_SOME
@example([("a", 1.7e308, True), ("b", 0.0, True), ("c", 5e-324, True)], None)
@given(st.lists(st.tuples(TEXT, NUMBERS, st.booleans()), max_size=6), st.none() | st.just(1e-5))
def test_dots_stay_inside(rows: list[tuple[str, float, bool]], limit: float | None) -> None:
    root = drawn(dots("t", "d", [Dot(*row) for row in rows], limit, "u"))
    wrong = [c for c in root.iter("circle") if "wrong" in str(c.get("class"))]
    assert len([*root.iter("circle")]) == len(rows)
    assert len(wrong) == sum(not passed for _, _, passed in rows)


@_SOME
@given(st.floats(1e-9, 1e9))
def test_ticks_are_round_and_few(largest: float) -> None:
    found = ticks(largest)
    assert found[0] == 0
    assert 2 <= len(found) <= 6
    assert found[-1] <= largest * (1 + 1e-9)
    step = found[1]
    assert float(f"{step:.0e}") == pytest.approx(step)


@_SOME
@given(TEXT, st.integers(2, 20))
def test_what_is_shortened_keeps_its_end(text: str, most: int) -> None:
    short = shorten(text, most)
    assert len(short) <= most
    assert text.endswith(short.removeprefix("…")) or short == text


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=3))
def test_every_form_holds_every_record(rows: list[tuple[str, str, str]]) -> None:
    folds = FoldReport(tuple(FoldRecord(a, "kept", (b,), c) for a, b, c in rows), {})
    sites = tuple(InsertRecord(a, b, 3, "skipped", None, c) for a, b, c in rows)
    for report in (folds, InsertReport(sites)):
        assert json.loads(to_json(report.to_dict())) == report.to_dict()
        report.to_html().encode("utf-8")
        str(report).encode("utf-8")
        lines = report.to_markdown().encode("utf-8").decode().split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith("|"))
        tables = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
        assert len(tables) == len(rows) + 2
        bare = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in tables]
        assert len(set(bare)) == 1
