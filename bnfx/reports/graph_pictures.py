"""The graph around each BatchNorm, before and after folding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnfx.graphs.examples import example
from bnfx.graphs.inference import inference_graph
from bnfx.graphs.naming import norm_path, owner_of
from bnfx.operators.calls import arguments, function_name
from bnfx.operators.layers import BATCH_NORM, affine_of
from bnfx.reports.document import Picture
from bnfx.reports.drawing import CHARACTER, add, markup, picture, shorten
from bnfx.reports.report import FoldRecord, FoldReport

_MOST_NODES = 14
_BOX, _GAP, _HEIGHT, _STEP = 156.0, 26.0, 38.0, 50.0


@dataclass(frozen=True)
class Box:
    """A node as drawn.

    Attributes:
        name: Its unique name.
        kind: What it computes.
        layer: Whose parameters it computes with; "" for none.
        inputs: Names of the boxes that it reads.
        mark: "norm", "into" or "".
    """

    name: str
    kind: str
    layer: str
    inputs: tuple[str, ...]
    mark: str = ""


def fold_pictures(
    model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, folded: fx.GraphModule
) -> list[Picture]:
    """One picture for each BatchNorm of `model`, with the graph around it before and after.

    Args:
        model: The unfolded model.
        args: Example inputs as `fold_bn` got them.
        kwargs: Likewise.
        folded: What `fold_bn` returned.
    """
    from bnfx.reports.report import report

    done = report(folded)
    assert isinstance(done, FoldReport)
    before = inference_graph(model, example(args, kwargs)).module
    old, new = list(_boxes(before)), list(_boxes(folded))
    waiting = list(done.batch_norms)
    pictures = []
    for box in [box for box in old if box.mark == "norm"]:
        record = next((bn for bn in waiting if bn.path == box.layer), None)
        if record is not None:
            waiting.remove(record)
            pictures.append(_draw(box, record, old, new, is_open=record.verdict != "folded"))
    return _some_open(pictures)


def _some_open(pictures: list[Picture]) -> list[Picture]:
    """Few pictures are all shown; of many, the first few that are not plain folds."""
    if len(pictures) <= 6:
        return [Picture(p.title, p.description, p.svg) for p in pictures]
    shown = [p for p in pictures if p.is_open][:4] or pictures[:2]
    return [Picture(p.title, p.description, p.svg, p in shown) for p in pictures]


def _boxes(module: fx.GraphModule) -> Iterator[Box]:
    """The nodes that carry data, in order."""
    for node in module.graph.nodes:
        if node.op not in ("get_attr", "output"):
            inputs = (n.name for n in node.all_input_nodes if n.op != "get_attr")
            yield Box(node.name, *_kind_and_layer(node, module), tuple(inputs), _mark(node))


def _mark(node: fx.Node) -> str:
    return "norm" if node.target in BATCH_NORM else ""


def _kind_and_layer(node: fx.Node, module: fx.GraphModule) -> tuple[str, str]:
    if node.op == "placeholder":
        return "input", str(node.target)
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__, str(node.target)
    if node.target in BATCH_NORM:
        return "BatchNorm", norm_path(node)
    row = affine_of(node, {})
    if row is not None:
        weight = arguments(node, row.signature)["weight"]
        known = isinstance(weight, fx.Node) and weight.op == "get_attr"
        return row.kind, owner_of(str(weight.target)) if known else ""
    kind = node.target if node.op == "call_method" else function_name(node.target)
    return str(kind), ""


def _draw(
    norm: Box, record: FoldRecord, old: Sequence[Box], new: Sequence[Box], *, is_open: bool
) -> Picture:
    into = set(record.into)
    near = _neighbourhood(norm, into, old)
    left = {box.name for box in near}
    after = _induced([box for box in new if box.name in left or box.layer in into], new)
    after = [_marked(box, "into" if box.layer in into else box.mark) for box in after]
    near = [_marked(box, "norm" if box.name == norm.name else "") for box in near]
    goes = f"goes into {', '.join(record.into)}" if record.into else record.reason or "stays"
    title = f"{record.path}: {record.verdict}, {goes}"
    description = f"before: {_chain(near)}; after: {_chain(after)}"
    columns = max(_depth(boxes) for boxes in (near, after)) + 1
    rows = [max(_rows(boxes)) for boxes in (near, after)]
    top = [24.0, 24.0 + _STEP * rows[0] + 24.0]
    width = columns * (_BOX + _GAP) + _GAP
    root = picture(width, top[1] + _STEP * rows[1], title, description)
    for name, boxes, y in (("before", near, top[0]), ("after", after, top[1])):
        add(root, "text", name, x=_GAP, y=y - 8, kind="tick")
        _place(root, boxes, y)
    return Picture(title, description, markup(root), is_open)


def _marked(box: Box, mark: str) -> Box:
    return Box(box.name, box.kind, box.layer, box.inputs, mark)


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

    return [Box(box.name, box.kind, box.layer, linked(box), box.mark) for box in chosen]


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
