"""A node of ONNX, as the functions that compute one in float64 are asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bnfx.numbers import Array

Computed = Tensor | Array | tuple[Tensor | Array, ...]


@dataclass(frozen=True)
class Call:
    """What a node says beside its inputs."""

    #: Name -> value, the defaults of its version included; None where there is none.
    attributes: Mapping[str, Any]
    opset: int
    #: How many outputs are asked for.
    outputs: int

    def __getitem__(self, name: str) -> Any:
        return self.attributes.get(name)

    def each(self, name: str, default: int, count: int) -> tuple[int, ...]:
        """A list of numbers, `count` times `default` where it is not given."""
        value = self[name]
        return tuple(value) if value is not None and len(value) else (default,) * count
