"""Pictures as SVG elements for a page whose style sheet gives the colours, in light and in dark.

Every text goes through ElementTree, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from bnfx.text import printable

#: Width of a character of the pictures' monospaced font at 11 px.
CHARACTER = 6.7
_WIDTH = 760
#: Beyond these a scale cannot be reckoned; such values are drawn at its ends.
_TINY, _HUGE = 1e-300, 1e300
_LABEL = 250.0  # left margin for the labels of bars


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    label: str
    value: float
    #: Ends of its spread.
    low: float
    high: float
    #: Value as written behind it.
    text: str
    #: Class in the style sheet: "main", "other" or "quiet".
    kind: str = "other"


@dataclass(frozen=True)
class Dot:
    """One value of a series, such as the error of a layer."""

    label: str
    value: float
    passed: bool


def picture(
    width: float, height: float, title: str, description: str, kind: str = "picture"
) -> ET.Element:
    """An empty picture that a screen reader can name."""
    root = ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width:g}",
            "height": f"{height:g}",
            "role": "img",
            "class": kind,
        },
    )
    ET.SubElement(root, "title").text = printable(title)
    ET.SubElement(root, "desc").text = printable(description)
    return root


def add(parent: ET.Element, tag: str, text: str = "", **attributes: object) -> ET.Element:
    """An element under `parent`; underscores in names stand for hyphens, `kind` for class."""
    named = {k.replace("_", "-"): v for k, v in attributes.items()}
    if "kind" in named:
        named["class"] = named.pop("kind")
    values = {
        k: f"{v:.1f}" if isinstance(v, float) else printable(str(v)) for k, v in named.items()
    }
    element = ET.SubElement(parent, tag, values)
    if text:
        element.text = printable(text)
    return element


def markup(root: ET.Element) -> str:
    """The picture as text."""
    return ET.tostring(root, encoding="unicode")


def shorten(text: str, most: int) -> str:
    """At most `most` characters; the end of a module path tells more than its beginning."""
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def bars(title: str, description: str, rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from zero, each with its spread."""
    step, top = 30.0, 8.0
    height = top + step * len(rows) + 30
    root = picture(_WIDTH, height, title, description, "picture chart")
    room = _WIDTH - _LABEL - 110
    largest = max((row.high for row in rows if _TINY < row.high < _HUGE), default=1.0)
    whole = all(float(row.value).is_integer() for row in rows)
    for tick in (t for t in ticks(largest) if not whole or t.is_integer()):
        x = _LABEL + room * tick / largest
        add(root, "line", x1=x, x2=x, y1=top, y2=height - 26, kind="grid")
        add(root, "text", f"{tick:g}", x=x, y=height - 12, kind="tick", text_anchor="middle")
    add(root, "text", unit, x=_WIDTH - 100.0, y=height - 12, kind="tick")
    for i, row in enumerate(rows):
        y = top + step * i
        group = add(root, "g")
        add(group, "title", f"{row.label}: {row.text}")
        label = shorten(row.label, int((_LABEL - 10) / CHARACTER))
        add(group, "text", label, x=_LABEL - 8, y=y + 18, kind="label", text_anchor="end")
        low, end, high = (  # what is no number has no length
            0.0 if math.isnan(v) else room * min(v, largest) / largest
            for v in (row.low, row.value, row.high)
        )
        add(group, "rect", x=_LABEL, y=y + 5, width=max(end, 0.5), height=18.0, kind=row.kind)
        if high > low:
            d = f"M{_LABEL + low:.1f} {y + 14:.1f}H{_LABEL + high:.1f}"
            add(group, "path", d=d, kind="spread")
        add(group, "text", row.text, x=_LABEL + max(end, high) + 6, y=y + 18, kind="value")
    return markup(root)


def said(rows: Sequence[Bar]) -> str:
    """Bars in words."""
    return "; ".join(f"{row.label} {row.text}" for row in rows)


def dots(title: str, description: str, rows: Sequence[Dot], limit: float | None, unit: str) -> str:
    """Values in order, on a logarithmic scale, with the limit that they must stay below."""
    height, left, right, top, bottom = 250.0, 64.0, 12.0, 14.0, 52.0
    finite = [row.value for row in rows if _TINY < row.value < _HUGE]
    known = [*finite, *([limit] if limit else [])] or [1.0]
    zeros = any(row.value == 0 for row in rows)
    low = math.floor(math.log10(min(known)) - 1e-9) - zeros
    high = max(math.ceil(math.log10(max(known)) + 1e-9), low + 1)
    root = picture(_WIDTH, height, title, description, "picture chart")
    floor = height - bottom

    def y_of(value: float) -> float:
        if value <= 0:
            return floor
        power = math.log10(value) if math.isfinite(value) else float(high)
        return floor - (floor - top) * (min(max(power, low), high) - low) / (high - low)

    stride = max(1, (high - low) // 6)
    for power in range(low, high + 1, stride):
        y = y_of(10.0**power)
        add(root, "line", x1=left, x2=_WIDTH - right, y1=y, y2=y, kind="grid")
        name = "0" if zeros and power == low else f"1e{power}"
        add(root, "text", name, x=left - 8, y=y + 4, kind="tick", text_anchor="end")
    if limit:
        y = y_of(limit)
        add(root, "line", x1=left, x2=_WIDTH - right, y1=y, y2=y, kind="limit")
        x, below = _WIDTH - right, y < top + 14
        name = f"limit {limit:g}"
        add(root, "text", name, x=x, y=y + (13 if below else -5), kind="tick", text_anchor="end")
    space = (_WIDTH - left - right) / max(len(rows), 1)
    for i, row in enumerate(rows):
        x, y = left + space * (i + 0.5), y_of(row.value)
        group = add(root, "g")
        add(group, "title", f"{row.label}: {row.value:.3g}")
        add(group, "line", x1=x, x2=x, y1=floor, y2=y, kind="stem" if row.passed else "stem wrong")
        radius = min(5.0, max(2.0, space / 3))
        add(group, "circle", cx=x, cy=y, r=radius, kind="dot" if row.passed else "dot wrong")
        if not row.passed and all(earlier.passed for earlier in rows[:i]):
            name, beside = shorten(row.label, 40), x > _WIDTH / 2
            anchor = "end" if beside else "start"
            shift = -9.0 if beside else 9.0
            add(root, "text", name, x=x + shift, y=max(y + 4, 14.0), text_anchor=anchor)
    _ends(root, rows, left, floor + 18)
    add(root, "text", unit, x=left, y=height - 8, kind="tick")
    return markup(root)


def _ends(root: ET.Element, rows: Sequence[Dot], left: float, y: float) -> None:
    """Names of the first and the last value; the others show theirs when pointed at."""
    most = int((_WIDTH - left) / 2 / CHARACTER) - 2
    if rows:
        add(root, "text", shorten(rows[0].label, most), x=left, y=y, kind="label")
    if len(rows) > 1:
        last = shorten(rows[-1].label, most)
        add(root, "text", last, x=_WIDTH - 12.0, y=y, kind="label", text_anchor="end")


def ticks(largest: float) -> list[float]:
    """About four round numbers from zero to `largest`."""
    rough = largest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [float(step * i) for i in range(int(largest / step + 1e-9) + 1)]
