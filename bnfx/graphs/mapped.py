"""New tensors in files that are mapped into memory, for graphs whose tensors are mapped too."""

from __future__ import annotations

import mmap
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Room:
    folder: Path
    maps: list[mmap.mmap] = field(default_factory=list)


_ROOM: ContextVar[_Room | None] = ContextVar("room", default=None)
#: Tensors of fewer bytes stay in memory.
_LARGE = 2**20


@contextmanager
def mapped_into(folder: Path) -> Iterator[None]:
    """Inside, large tensors of `unfilled` lie in files of `folder`, which are gone at the end."""
    token = _ROOM.set(_Room(folder))
    try:
        yield
    finally:
        _ROOM.reset(token)


def unfilled(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A new tensor on the CPU, of any values; those before it leave the memory."""
    room, size = _ROOM.get(), shape.numel() * dtype.itemsize
    if room is None or size < _LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    unload()
    with tempfile.TemporaryFile(dir=room.folder) as stream:
        stream.truncate(size)
        room.maps.append(mmap.mmap(stream.fileno(), size))
    return torch.frombuffer(room.maps[-1], dtype=dtype).view(shape)


def outside_heap(tensor: Tensor) -> Tensor:
    """The same values where what was freed around them leaves no gaps, on the CPU."""
    size = tensor.numel() * tensor.element_size()
    if size < _LARGE or tensor.device.type != "cpu":
        return tensor
    if _ROOM.get() is not None:
        return unfilled(tensor.shape, tensor.dtype).copy_(tensor)
    return (
        torch.frombuffer(mmap.mmap(-1, size), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
    )


def unload() -> None:
    """Let the system keep what is mapped in its files; it comes back where it is read."""
    room = _ROOM.get()
    if room is not None and sys.platform == "linux":
        for mapped in room.maps:
            mapped.madvise(mmap.MADV_DONTNEED)
