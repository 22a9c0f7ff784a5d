"""A model that takes what a camera or a file gives, and normalises it as its training did."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnfx.errors import CaptureError

Values = float | Sequence[float] | Tensor | None


class _Normalised(nn.Module):
    """`model` on (x * scale - mean) / std, x its first argument; buffers are 1 or C numbers."""

    input_scale: Tensor
    input_mean: Tensor
    input_std: Tensor

    def __init__(self, model: nn.Module, scale: Tensor, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_mean", mean)
        self.register_buffer("input_std", std)
        self.train(model.training)


def normalised(
    model: nn.Module,
    example: Any,
    *,
    scale: Values = None,
    mean: Values = None,
    std: Values = None,
) -> nn.Module:
    """A module that computes model((x * scale - mean) / std, ...) and shares the model's weights.

    The arithmetic is done in the dtype of the model, whatever the dtype of x. As part of the graph
    it folds like any other: W (s x - m) / d + b = (W s / d) x + (b - W m / d), where no zeros are
    padded in between.

    Args:
        model: In whatever mode it is.
        example: Its first argument before normalisation, [N, C, ...], such as pixels in uint8.
        scale: What x is multiplied by first, such as 1 / 255: one number, or C; None for 1.
        mean: What is subtracted then; None for 0.
        std: What that is divided by; None for 1.

    Raises:
        CaptureError: The numbers do not fit the example, or are none to normalise by.
    """
    if not isinstance(example, Tensor) or example.dim() < 2:
        raise CaptureError(
            "input_mean, input_std and input_scale normalise the first argument, which is no "
            "tensor [N, C, ...] here; normalise in the model's forward"
        )
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    sizes = (example.shape[1], *(1,) * (example.dim() - 2))
    values = []
    for name, given, default in (("scale", scale, 1), ("mean", mean, 0), ("std", std, 1)):
        value = torch.as_tensor(default if given is None else given, dtype=torch.float64).flatten()
        if value.numel() not in (1, sizes[0]):
            raise CaptureError(
                f"input_{name} has {value.numel()} numbers and the first argument "
                f"{sizes[0]} channels (axis 1); give one number, or {sizes[0]}"
            )
        if not value.isfinite().all() or (name != "mean" and (value == 0).any()):
            raise CaptureError(f"input_{name} is {value.tolist()}: nothing is normalised by that")
        shape = (1, *sizes) if value.numel() > 1 else ()
        values.append(value.to(example.device, dtype).reshape(shape))

    # The forward has the model's own signature: the names of a file's inputs come from it.
    @functools.wraps(type(model).forward)
    def forward(self: _Normalised, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raw = x.to(self.input_scale.dtype)
        return self.model(
            (raw * self.input_scale - self.input_mean) / self.input_std, *args, **kwargs
        )

    made = type(type(model).__name__, (_Normalised,), {"forward": forward})
    return cast(nn.Module, made(model, *values))
