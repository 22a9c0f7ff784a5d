"""Arithmetic of a deployment, run by torch: what the unfolded model itself errs there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Functions whose factors CUDA rounds to TF32.
_PRODUCTS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"),
    *("einsum", "scaled_dot_product_attention", "multi_head_attention_forward"),
}


def to_tf32(value: Tensor) -> Tensor:
    """A float32 tensor with its mantissas rounded to the 10 bits of TF32."""
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(value), rounded.view(torch.float32), value)


class Tf32(TorchFunctionMode):
    """Factors of convolutions and matrix products are rounded to TF32, sums stay in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, on rounded factors where it multiplies."""
        if getattr(func, "__name__", "") not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        rounded = [_rounded(arg) for arg in args]
        return func(*rounded, **{k: _rounded(v) for k, v in (kwargs or {}).items()})


def _rounded(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype is torch.float32
    return to_tf32(value.detach()) if narrow else value


class StoredAs(TorchFunctionMode):
    """Every floating result is rounded to a narrow dtype and goes on in float32.

    For operators that torch lacks in that dtype on the CPU.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` in float32 and round its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype is torch.float32:
            return result.to(self.dtype).float()
        return result
