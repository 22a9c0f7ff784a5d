"""Stored tensors as torch has them, and back: external data is mapped, not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from bnfx.numbers import Array
from bnfx.onnx_files.reading import external_location, tensor_array

_T = onnx.TensorProto
#: Element types that torch computes with: how numpy reads their bytes, and what they are.
_TYPES: dict[int, tuple[str, torch.dtype]] = {
    _T.FLOAT: ("<f4", torch.float32),
    _T.DOUBLE: ("<f8", torch.float64),
    _T.FLOAT16: ("<f2", torch.float16),
    _T.BFLOAT16: ("<i2", torch.bfloat16),
    _T.INT64: ("<i8", torch.int64),
    _T.INT32: ("<i4", torch.int32),
    _T.INT16: ("<i2", torch.int16),
    _T.INT8: ("|i1", torch.int8),
    _T.UINT8: ("|u1", torch.uint8),
    _T.BOOL: ("|b1", torch.bool),
}
_ELEMENT = {dtype: kind for kind, (_, dtype) in _TYPES.items()}


def dtype_of(elem_type: int) -> torch.dtype | None:
    """The dtype of an element type; None for those that torch does not compute with."""
    return _TYPES[elem_type][1] if elem_type in _TYPES else None


def any_dtype(elem_type: int) -> torch.dtype | None:
    """The dtype that stores elements of a type; None where torch has none, or it is no type."""
    if (known := dtype_of(elem_type)) is not None or elem_type not in _T.DataType.values():
        return known
    try:
        return torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(elem_type))).dtype
    except (KeyError, TypeError):
        return None


def element_type(dtype: torch.dtype) -> int:
    """The element type of a dtype that `dtype_of` gives."""
    return _ELEMENT[dtype]


def tensor_of(stored: onnx.TensorProto, folder: Path) -> Tensor | None:
    """The values of a stored tensor; None for strings, complex and sub-byte numbers.

    External data in `folder` is mapped into memory, and what is written to it stays there.
    """
    if stored.data_type not in _TYPES:
        return None
    code, dtype = _TYPES[stored.data_type]
    shape = tuple(stored.dims)
    if stored.data_location == _T.EXTERNAL and np.prod(shape, dtype=np.int64):
        location, offset, _ = external_location(stored)
        mapped = np.memmap(folder / location, np.dtype(code), "c", offset, shape or (1,))
        return torch.from_numpy(mapped.reshape(shape)).view(dtype)
    return of_array(tensor_array(stored, folder))


def of_array(values: Array) -> Tensor | None:
    """A copy of an array; None for types that torch does not have."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    if kind not in _TYPES:
        return None
    code, dtype = _TYPES[kind]
    own = np.array(values)  # what numpy made of bytes can't be written to, which torch warns of
    return torch.from_numpy(own.view(np.dtype(code))).view(dtype)


def stored_form(name: str, values: Tensor) -> onnx.TensorProto:
    """A tensor to store, its values inside."""
    stored = onnx.TensorProto(name=name, data_type=_ELEMENT[values.dtype], dims=values.shape)
    stored.raw_data = raw_bytes(values)
    return stored


def raw_bytes(values: Tensor) -> bytes:
    """The bytes of a tensor in row-major order, little-endian as ONNX wants them."""
    plain = values.detach().cpu().contiguous()
    if plain.dtype is torch.bfloat16:
        plain = plain.view(torch.int16)
    array = plain.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def array_of(values: Tensor) -> Array:
    """The same values for numpy, bfloat16 in the type that onnx has for it."""
    if values.dtype is torch.bfloat16:
        wide = onnx.helper.tensor_dtype_to_np_dtype(_T.BFLOAT16)
        return np.asarray(values.detach().view(torch.int16).numpy().view(wide))
    return np.asarray(values.detach().numpy())
