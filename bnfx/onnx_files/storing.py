"""A changed model as a file: weights inside, or streamed into a file beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
from torch import Tensor

from bnfx.graphs.mapped import unload
from bnfx.onnx_files.placing import name_by_content
from bnfx.onnx_files.reading import external_location, stored_tensors
from bnfx.onnx_files.tensors import raw_bytes

_EXTERNAL = onnx.TensorProto.EXTERNAL
#: A graph of more bytes is written with its weights beside it; protobuf ends at 2 GiB.
_INSIDE = 1_900_000_000
#: Tensors of fewer bytes stay in the graph.
_SMALL = 1024
_ALIGNED = 4096
_CHUNK = 1 << 24


def is_beside(model: onnx.ModelProto) -> bool:
    """Whether weights of a model lie in a file beside it."""
    return any(tensor.data_location == _EXTERNAL for tensor, _ in stored_tensors(model))


def store(
    model: onnx.ModelProto, new: Mapping[str, Tensor], source: Path, written: Path, *, beside: bool
) -> None:
    """Write `model` to the file `written`.

    Args:
        model: With the names, types and shapes of its new tensors; it gets their values.
        new: Values of new initializers and constants, by name.
        source: The file that `model` was read from.
        written: Where to write, in an empty folder.
        beside: Whether weights go into a file beside it, as those do that no file could hold.
    """
    for node in model.graph.node:  # not every runtime reads constants of nodes from beside
        if node.op_type == "Constant" and node.output[0] in new:
            node.attribute[0].t.raw_data = raw_bytes(new[node.output[0]])
    places = [(t, new[t.name]) for t in model.graph.initializer if t.name in new]
    inside = model.ByteSize() + sum(value.nbytes for _, value in places)
    if not beside and inside <= _INSIDE:
        for place, value in places:
            place.raw_data = raw_bytes(value)
        written.write_bytes(model.SerializeToString())
        return
    with written.with_name(f"{written.name}.data").open("wb") as stream:
        for tensor, _ in stored_tensors(model):
            if tensor.data_location == _EXTERNAL:
                location, offset, length = external_location(tensor)
                data = source.parent / location
                length = data.stat().st_size - offset if length is None else length
                _put(stream, tensor, _chunks(data, offset, length), length)
        for place, value in places:
            if value.nbytes > _SMALL:
                _put(stream, place, _rows(value), value.nbytes)
                unload()
            else:
                place.raw_data = raw_bytes(value)
        for tensor in model.graph.initializer if inside > _INSIDE else ():
            if len(tensor.raw_data) > _SMALL:
                raw = tensor.raw_data
                tensor.ClearField("raw_data")
                _put(stream, tensor, [raw], len(raw))
    written.write_bytes(model.SerializeToString())
    name_by_content(written)


def _put(stream: BinaryIO, tensor: onnx.TensorProto, parts: Iterable[bytes], length: int) -> None:
    stream.write(b"\0" * (-stream.tell() % _ALIGNED))
    where = {"location": Path(stream.name).name, "offset": stream.tell(), "length": length}
    for part in parts:
        stream.write(part)
    tensor.data_location = _EXTERNAL
    del tensor.external_data[:]
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))


def _rows(value: Tensor) -> Iterator[bytes]:
    rows = value.reshape(1) if value.dim() == 0 else value
    step = max(1, _CHUNK // max(1, rows[:1].nbytes))
    yield from (raw_bytes(rows[at : at + step]) for at in range(0, len(rows), step))


def _chunks(data: Path, offset: int, length: int) -> Iterator[bytes]:
    with data.open("rb") as stream:
        stream.seek(offset)
        while length > 0:
            part = stream.read(min(_CHUNK, length))
            length -= len(part)
            yield part
