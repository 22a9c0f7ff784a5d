"""Inputs and outputs of a session as numpy has them; bfloat16, which it lacks, as float32."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from bnfx.errors import ProviderError
from bnfx.numbers import Array
from bnfx.runtime.sessions import load_onnxruntime

_BFLOAT16 = "tensor(bfloat16)"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def run_session(session: Any, feed: Mapping[str, Array]) -> list[Array]:
    """All outputs of a session.

    Args:
        session: Of onnxruntime.
        feed: Arrays by the names of the inputs.

    Raises:
        Exception: As of `runtime_errors`.
    """
    values = (*session.get_inputs(), *session.get_outputs())
    if all(value.type != _BFLOAT16 for value in values):
        return [np.asarray(out) for out in session.run(None, dict(feed))]
    types = {value.name: value.type for value in session.get_inputs()}
    given = {name: ort_value(array, types[name]) for name, array in feed.items()}
    return [_array(out) for out in session.run_with_ort_values(None, given)]


def ort_value(array: Array, kind: str, memory: tuple[str, int] = ("cpu", 0)) -> Any:
    """An `OrtValue` of an input's type, such as "tensor(bfloat16)", which lies on the CPU."""
    ort = load_onnxruntime()
    if kind != _BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *memory)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + even) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
    make = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    return make(rounded, onnx.TensorProto.BFLOAT16)


def empty_value(shape: Sequence[object], kind: str, memory: tuple[str, int]) -> Any:
    """An `OrtValue` to write an output to.

    Raises:
        ProviderError: The output has no fixed size, or is no tensor of numbers.
    """
    if kind not in _DTYPES or not all(isinstance(size, int) for size in shape):
        raise ProviderError(
            f"a captured graph needs outputs of fixed size, and one is {kind}{list(shape)}: export "
            "without free axes"
        )
    ort = load_onnxruntime()
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _DTYPES[kind], *memory)


def _array(value: Any) -> Array:
    if value.data_type() != _BFLOAT16:
        return np.asarray(value.numpy())
    shape: Sequence[int] = value.shape()
    count = int(np.prod(shape))
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr()) if count else ()
    wide = np.array(bits, np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(shape)
