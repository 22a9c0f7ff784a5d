"""Operators of ONNX that move elements, or ask for sizes, as torch has them."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from bnfx.numbers import Array
from bnfx.onnx_files.node_call import SIZES, Call, NoFunction
from bnfx.onnx_files.tensors import dtype_of

_SLICE = torch.ops.aten.slice.Tensor
_END = 2**63 - 1


# -- sizes, as functions of the graph --------------------------------------------------------------


def shape_array(sizes: tuple[int, ...], start: int, end: int | None) -> Array:
    """What Shape gives."""
    return np.array(tuple(sizes)[start:end], np.int64)


def count(sizes: tuple[int, ...]) -> Array:
    """What Size gives."""
    return np.array(math.prod(sizes), np.int64)


def wanted_shape(sizes: tuple[int, ...], asked: tuple[int, ...]) -> tuple[int, ...]:
    """What Reshape asks for, a 0 standing for the size that is there."""
    return tuple(sizes[at] if n == 0 else n for at, n in enumerate(asked))


def flat_shape(sizes: tuple[int, ...], axis: int) -> tuple[int, int]:
    """What Flatten gives."""
    return math.prod(sizes[:axis]), math.prod(sizes[axis:])


def spread_shape(sizes: tuple[int, ...], asked: tuple[int, ...]) -> tuple[int, ...]:
    """What Expand gives: both shapes broadcast."""
    return tuple(np.broadcast_shapes(tuple(sizes), tuple(asked)))


def equal_part(sizes: tuple[int, ...], axis: int, parts: int) -> int:
    """The size of one of several parts; the last one may be smaller."""
    return -(-sizes[axis] // parts)


def blocks(sizes: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape in which DepthToSpace has blocks behind the batch."""
    n, c, h, w = sizes
    return n, block, block, c // block**2, h, w


def joined(sizes: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape that DepthToSpace gives."""
    n, c, h, w = sizes
    return n, c // block**2, h * block, w * block


def parted(sizes: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape in which SpaceToDepth has blocks behind the pixels."""
    n, c, h, w = sizes
    return n, c, h // block, block, w // block, block


def stacked(sizes: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape that SpaceToDepth gives."""
    n, c, h, w = sizes
    return n, c * block**2, h // block, w // block


# -- operators -------------------------------------------------------------------------------------


def _shape(call: Call) -> fx.Node:
    sizes = call.size(call.data())
    start, end = call.attribute("start", 0), call.attribute("end")
    made = call.main(shape_array, sizes, start, end)
    made.meta[SIZES] = True
    with contextlib.suppress(NoFunction):
        fixed = call.shape()[start:end]
        if None not in fixed:
            call.result = torch.tensor(fixed, dtype=torch.int64)
    return made


def nothing(sizes: tuple[int, ...]) -> None:
    """What is left of reading a tensor for its dtype alone."""
    del sizes


def _cast_like(call: Call) -> fx.Node:
    """A constant in the dtype of what is computed."""
    value, known = call.wanted(0), call.scope.known.get(call.name_of(1))
    kind = dtype_of(known.elem_type) if known is not None else None
    if kind is None:
        raise NoFunction
    call.result = value.to(kind)
    return call.main(nothing, call.size(call.data(1)))


def _count(call: Call) -> fx.Node:
    made = call.main(count, call.size(call.data()))
    made.meta[SIZES] = True
    return made


def _reshape(call: Call) -> fx.Node:
    source, asked = call.data(), call.sizes_in(1)
    if not call.attribute("allowzero", 0) and not (isinstance(asked, tuple) and 0 not in asked):
        asked = call.sizes(wanted_shape, call.size(source), asked)
    return call.main(torch.reshape, source, asked)


def _flatten(call: Call) -> fx.Node:
    source, axis = call.data(), int(call.attribute("axis", 1))
    if axis == 1:
        return call.main(torch.flatten, source, 1)
    return call.main(torch.reshape, source, call.sizes(flat_shape, call.size(source), axis))


def _transpose(call: Call) -> fx.Node:
    axes = call.attribute("perm") or tuple(reversed(range(call.rank())))
    return call.main(torch.permute, call.data(), tuple(axes))


def _axes(call: Call, since: int) -> tuple[int, ...] | None:
    axes = call.attribute("axes")
    if call.opset >= since:
        axes = call.numbers(1) if call.name_of(1) else None
    return None if axes is None else tuple(axes)


def _squeeze(call: Call) -> fx.Node:
    axes = _axes(call, 13)
    if axes is None:
        return call.main(torch.squeeze, call.data())
    return call.main(torch.squeeze, call.data(), axes)


def _unsqueeze(call: Call) -> fx.Node:
    """Axes are those of the result; torch takes one at a time."""
    axes = _axes(call, 13) or ()
    total = len(axes) + (call.rank() if any(a < 0 for a in axes) else 0)
    places = sorted(a + total if a < 0 else a for a in axes)
    if not places:
        raise NoFunction
    made = call.data()
    for axis in places[:-1]:
        made = call.part(torch.unsqueeze, made, axis)
    return call.main(torch.unsqueeze, made, places[-1])


def _concatenated(call: Call) -> fx.Node:
    parts = [call.member(at, at) for at in range(len(call.node.input))]
    return call.main(torch.cat, parts, int(call.attribute("axis", 1)))


def _split(call: Call) -> list[fx.Node]:
    axis, source = int(call.attribute("axis", 0)), call.data()
    sizes: Any = call.attribute("split")
    if call.opset >= 13:
        sizes = call.sizes_in(1) if call.name_of(1) else None
    if sizes is None:
        parts = int(call.attribute("num_outputs", len(call.node.output)))
        sizes = call.sizes(equal_part, call.size(source), axis, parts)
    made = call.main(torch.split, source, tuple(sizes) if isinstance(sizes, list) else sizes, axis)
    return [call.part(operator.getitem, made, at) for at in range(len(call.node.output))]


def _split_to_sequence(call: Call) -> fx.Node:
    """Parts of one size, or of several; torch has them in a tuple."""
    if not call.name_of(1) and not call.attribute("keepdims", 1):
        raise NoFunction
    parts = call.wanted(1) if call.name_of(1) else torch.tensor(1)
    sizes = call.numbers(1) if parts.dim() else int(parts)
    return call.main(torch.split, call.data(), sizes, int(call.attribute("axis", 0)))


def _sequence_at(call: Call) -> fx.Node:
    return call.main(operator.getitem, call.data(), int(call.wanted(1)))


def _joined_sequence(call: Call) -> fx.Node:
    function = torch.stack if call.attribute("new_axis", 0) else torch.cat
    return call.main(function, call.data(), int(call.attribute("axis")))


def _sliced(call: Call) -> fx.Node:
    """One slice for each axis; backwards only a whole axis."""
    if call.opset < 10:
        starts, ends = call.attribute("starts"), call.attribute("ends")
        axes, steps = call.attribute("axes"), None
    else:
        starts, ends = call.sizes_in(1), call.sizes_in(2)
        axes = call.numbers(3) if call.name_of(3) else None
        steps = call.numbers(4) if call.name_of(4) else None
    source = call.data()
    known = next((part for part in (axes, starts, ends) if isinstance(part, tuple | list)), None)
    if known is None:
        raise NoFunction
    axes = tuple(range(len(known))) if axes is None else axes
    steps = (1,) * len(axes) if steps is None else steps
    cuts = [
        _cut(call, axis, _item(call, starts, at), _item(call, ends, at), steps[at])
        for at, axis in enumerate(axes)
    ]
    for function, args in cuts[:-1]:
        source = call.part(function, source, *args)
    function, args = cuts[-1]
    return call.main(function, source, *args)


def _item(call: Call, numbers: Any, at: int) -> Any:
    if isinstance(numbers, fx.Node):
        return call.sizes(operator.getitem, numbers, at)
    return int(numbers[at])


def _cut(call: Call, axis: int, start: Any, end: Any, step: int) -> tuple[Any, tuple[Any, ...]]:
    if step > 0:
        return _SLICE, (axis, start, end, step)
    size = call.shape()[call.axis(axis)]
    whole = isinstance(start, int) and isinstance(end, int) and step == -1
    if whole and (start == -1 or start >= (size or _END) - 1) and end < -(size or _END - 1):
        return torch.flip, ((axis,),)
    raise NoFunction


def _gathered(call: Call) -> fx.Node:
    """By constant places; one place takes the axis away."""
    places, axis = call.wanted(1), int(call.attribute("axis", 0))
    source = call.data()
    if places.dim() == 0:
        return call.main(torch.select, source, axis, int(places))
    if places.dim() != 1:
        raise NoFunction
    if bool((places < 0).any()):
        size = call.shape()[call.axis(axis)]
        if size is None:
            raise NoFunction
        places = torch.where(places < 0, places + size, places)
    index = call.scope.read(f"{call.path}.indices", places.long(), call.name_of(1))
    return call.main(torch.index_select, source, axis, index)


def _expanded(call: Call) -> fx.Node:
    source, asked = call.data(), call.sizes_in(1)
    return call.method("expand", source, call.sizes(spread_shape, call.size(source), asked))


def _tiled(call: Call) -> fx.Node:
    return call.method("repeat", call.data(), call.sizes_in(1))


def _depth_to_space(call: Call) -> fx.Node:
    source, block = call.data(), int(call.attribute("blocksize"))
    if call.attribute("mode", "DCR") == "CRD":
        return call.main(F.pixel_shuffle, source, block)
    sizes = call.size(source)
    apart = call.part(torch.reshape, source, call.sizes(blocks, sizes, block))
    moved = call.part(torch.permute, apart, (0, 3, 4, 1, 5, 2))
    return call.main(torch.reshape, moved, call.sizes(joined, sizes, block))


def _space_to_depth(call: Call) -> fx.Node:
    source, block = call.data(), int(call.attribute("blocksize"))
    sizes = call.size(source)
    apart = call.part(torch.reshape, source, call.sizes(parted, sizes, block))
    moved = call.part(torch.permute, apart, (0, 3, 5, 1, 2, 4))
    return call.main(torch.reshape, moved, call.sizes(stacked, sizes, block))


_PADS = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


def _padded(call: Call) -> fx.Node:
    """Pads; torch mirrors and repeats along space alone."""
    if call.opset < 11:
        pads, fill = tuple(call.attribute("pads")), float(call.attribute("value", 0.0))
    else:
        pads = call.numbers(1)
        fill = float(call.wanted(2)) if call.name_of(2) else 0.0
    rank, mode = call.rank(), _PADS.get(str(call.attribute("mode", "constant")))
    if call.name_of(3):
        axes = [call.axis(axis) for axis in call.numbers(3)]
        wide = [0] * (2 * rank)
        for at, axis in enumerate(axes):
            wide[axis], wide[axis + rank] = pads[at], pads[at + len(axes)]
        pads = tuple(wide)
    if mode is None:
        raise NoFunction
    widths = [w for axis in reversed(range(rank)) for w in (pads[axis], pads[axis + rank])]
    if mode == "constant":
        return call.main(F.pad, call.data(), tuple(widths), "constant", fill)
    if any(widths[-4:]) or not 3 <= rank <= 5 or min(widths) < 0:
        raise NoFunction
    return call.main(F.pad, call.data(), tuple(widths[:-4]), mode)


FUNCTIONS: dict[str, Callable[[Call], Any]] = {
    "CastLike": _cast_like,
    "Concat": _concatenated,
    "ConcatFromSequence": _joined_sequence,
    "DepthToSpace": _depth_to_space,
    "Expand": _expanded,
    "Flatten": _flatten,
    "Gather": _gathered,
    "Pad": _padded,
    "Reshape": _reshape,
    "SequenceAt": _sequence_at,
    "Shape": _shape,
    "Size": _count,
    "Slice": _sliced,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Tile": _tiled,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
