"""Sizes of a file's inputs: those that it declares, and some for those that it leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

#: Sizes to try along axes that a file leaves open, the batch excepted.
SPACE = (64, 224, 32, 28, 8, 96, 128, 256, 299, 384, 512)
_BATCH = 2


@dataclass(frozen=True)
class Axes:
    """The axes of one input: a size, or the name of one that is open."""

    name: str
    elem_type: int
    sizes: tuple[int | str, ...]

    def filled(self, open_sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with sizes for what is open."""
        return tuple(open_sizes[n] if isinstance(n, str) else n for n in self.sizes)


def axes_of(value: onnx.ValueInfoProto, known: Mapping[int, int]) -> Axes | None:
    """The axes of an input; None where its rank is unknown.

    Args:
        value: The input.
        known: Sizes by axis of which the file says nothing, but what reads the input does.
    """
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    sizes: list[int | str] = []
    for at, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            sizes.append(dim.dim_value)
        elif at in known:
            sizes.append(known[at])
        else:
            named = dim.dim_param if dim.dim_param not in ("", "?") else f"{value.name}:{at}"
            sizes.append(named)
    return Axes(value.name, tensor.elem_type, tuple(sizes))


def open_axes(inputs: Sequence[Axes]) -> dict[str, bool]:
    """Names of what is open, and whether that is a batch: always the first axis."""
    found: dict[str, bool] = {}
    for axes in inputs:
        for at, size in enumerate(axes.sizes):
            if isinstance(size, str):
                found[size] = found.get(size, True) and at == 0
    return found


def filled(names: Mapping[str, bool], space: int) -> dict[str, int]:
    """A batch of two, and `space` along the other axes."""
    return {name: _BATCH if batch else space for name, batch in names.items()}


def varied(names: Mapping[str, bool], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Other sizes of what is open: all others, one larger than the other first."""
    space = [name for name, batch in names.items() if not batch]
    batch = {name: sizes[name] + 1 for name, first in names.items() if first}
    apart = {name: sizes[name] + 32 * (at + 1) for at, name in enumerate(space)}
    alike = {name: sizes[name] + 32 for name in space}
    found = [{**sizes, **batch, **more} for more in (apart, alike, {})]
    found.append({**sizes, **alike})
    return [other for at, other in enumerate(found) if other != sizes and other not in found[:at]]
