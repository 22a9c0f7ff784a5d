"""The graph around each BatchNorm, before and after folding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bnfx.reports.document import Picture
from bnfx.reports.drawing import CHARACTER, add, markup, picture, shorten

_MOST_NODES = 14
_BOX, _GAP, _HEIGHT, _STEP = 156.0, 26.0, 38.0, 50.0


@dataclass(frozen=True)
class Box:
    """A node of a graph as drawn."""

    #: Its unique name.
    name: str
    #: What it computes.
    kind: str
    #: Whose parameters it computes with; "" for none.
    layer: str
    #: Names of the boxes that it reads.
    inputs: tuple[str, ...]
    #: "norm", "into" or "".
    mark: str = ""


def around(
    norm: Box, title: str, into: Sequence[str], before: Sequence[Box], after: Sequence[Box]
) -> Picture:
    """The graph around a BatchNorm.

    Args:
        norm: The BatchNorm, one of `before`.
        title: What became of it.
        into: The layers that carry it now.
        before: The graph that has it.
        after: The graph that came of it.
    """
    near = _neighbourhood(norm, set(into), before)
    left = {box.name for box in near}
    rest = _induced([box for box in after if box.name in left or box.layer in into], after)
    rest = [replace(box, mark="into" if box.layer in into else box.mark) for box in rest]
    near = [replace(box, mark="norm" if box.name == norm.name else "") for box in near]
    description = f"before: {_chain(near)}; after: {_chain(rest)}"
    columns = max(_depth(boxes) for boxes in (near, rest)) + 1
    rows = [max(_rows(boxes)) for boxes in (near, rest)]
    top = [24.0, 24.0 + _STEP * rows[0] + 24.0]
    width = columns * (_BOX + _GAP) + _GAP
    root = picture(width, top[1] + _STEP * rows[1], title, description)
    for name, boxes, y in (("before", near, top[0]), ("after", rest, top[1])):
        add(root, "text", name, x=_GAP, y=y - 8, kind="tick")
        _place(root, boxes, y)
    return Picture(title, description, markup(root))


def _neighbourhood(norm: Box, into: set[str], boxes: Sequence[Box]) -> list[Box]:
    """The BatchNorm, what it reads, what reads it, and the way to the layers that took its map."""
    by_name = {box.name: box for box in boxes}
    readers: dict[str, list[str]] = {box.name: [] for box in boxes}
    for box in boxes:
        for name in box.inputs:
            if name in readers:
                readers[name].append(box.name)
    chosen = {norm.name: None, **dict.fromkeys([*norm.inputs, *readers[norm.name]])}
    inputs = {box.name: [name for name in box.inputs if name in by_name] for box in boxes}
    for step in (inputs, readers):
        chosen |= dict.fromkeys(
            _ways(norm.name, step, {n for n in by_name if by_name[n].layer in into})
        )
    names = set(list(chosen)[:_MOST_NODES])
    return _induced([box for box in boxes if box.name in names], boxes)


def _ways(start: str, step: Mapping[str, Sequence[str]], goals: set[str]) -> list[str]:
    """The nodes of the shortest ways from `start` to each goal."""
    came: dict[str, str] = {start: start}
    queue = [start]
    for name in queue:
        for following in step[name]:
            if following not in came:
                came[following] = name
                queue.append(following)
    found: dict[str, None] = {}
    for name in (name for name in queue if name in goals and name != start):
        while name != start:
            found[name] = None
            name = came[name]
    return list(found)


def _induced(chosen: Sequence[Box], boxes: Sequence[Box]) -> list[Box]:
    """`chosen` with their inputs among themselves, through at most three nodes left out."""
    by_name, kept = {box.name: box for box in boxes}, {box.name for box in chosen}

    def sources(name: str, far: int) -> Iterator[str]:
        if name in kept:
            yield name
        elif far and name in by_name:
            for earlier in by_name[name].inputs:
                yield from sources(earlier, far - 1)

    def linked(box: Box) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for name in box.inputs for s in sources(name, 3)))

    return [replace(box, inputs=linked(box)) for box in chosen]


def _columns(boxes: Sequence[Box]) -> dict[str, int]:
    """Column of each box: behind all of its inputs."""
    column: dict[str, int] = {}
    for box in boxes:
        column[box.name] = max(
            (column[name] + 1 for name in box.inputs if name in column), default=0
        )
    return column


def _depth(boxes: Sequence[Box]) -> int:
    return max(_columns(boxes).values(), default=0)


def _rows(boxes: Sequence[Box]) -> list[int]:
    """How many boxes stand in each column."""
    columns = list(_columns(boxes).values())
    return [columns.count(i) for i in range(max(columns, default=0) + 1)]


def _chain(boxes: Sequence[Box]) -> str:
    return ", ".join(f"{box.kind} {box.layer}".strip() for box in boxes) or "nothing"


def _place(root: Any, boxes: Sequence[Box], top: float) -> None:
    column, taken = _columns(boxes), dict[int, int]()
    corner: dict[str, tuple[float, float]] = {}
    for box in boxes:
        i = column[box.name]
        corner[box.name] = (_GAP + i * (_BOX + _GAP), top + _STEP * taken.get(i, 0))
        taken[i] = taken.get(i, 0) + 1
    for box in boxes:
        for name in box.inputs:
            _arrow(root, corner[name], corner[box.name])
    for box in boxes:
        _box(root, box, corner[box.name])


def _arrow(root: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    x0, y0 = start[0] + _BOX, start[1] + _HEIGHT / 2
    x1, y1 = end[0] - 1, end[1] + _HEIGHT / 2
    bend = _GAP * 0.6
    path = f"M{x0:.1f} {y0:.1f}C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    add(root, "path", d=path, kind="edge")
    add(root, "path", d=f"M{x1 - 5:.1f} {y1 - 3.5:.1f}L{x1:.1f} {y1:.1f}l-5 3.5", kind="edge")


def _box(root: Any, box: Box, corner: tuple[float, float]) -> None:
    x, y = corner
    group = add(root, "g")
    add(group, "title", f"{box.kind} {box.layer} ({box.name})")
    kind = f"box {box.mark}".strip()
    add(group, "rect", x=x, y=y, width=_BOX, height=_HEIGHT, rx=5.0, kind=kind)
    most, middle = int((_BOX - 10) / CHARACTER), x + _BOX / 2
    lines = [box.kind[:most], *([shorten(box.layer, most)] if box.layer else [])]
    first = y + _HEIGHT / 2 + (4 if len(lines) == 1 else -3)
    for i, line in enumerate(lines):
        style = "kind" if i == 0 else "layer"
        add(group, "text", line, x=middle, y=first + 14.0 * i, kind=style, text_anchor="middle")
