"""Small networks with round numbers, in float64, for tests that are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def net(result: str, *lines: str, args: str = "x", **parts: nn.Module | Tensor) -> nn.Module:
    """A module whose forward runs `lines` and returns `result`; `self` has `parts`.

    Tensors become buffers. In eval mode and in float64.
    """
    body = "".join(f"\n    {line}" for line in [*lines, f"return {result}"])
    source = f"def forward(self, {args}):{body}"
    scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn}
    exec(source, scope)
    made = type("Net", (nn.Module,), {"forward": scope["forward"], "source": source})()
    assert isinstance(made, nn.Module)
    for name, part in parts.items():
        if isinstance(part, nn.Module | nn.Parameter):
            setattr(made, name, part)
        else:
            made.register_buffer(name, part)
    return made.double().eval()


def chain(*layers: nn.Module) -> nn.Module:
    """Layers one after the other, in eval mode and in float64."""
    return nn.Sequential(*layers).double().eval()


def numbered(layer: nn.Module) -> Any:
    """The layer with weights 1, 2, 3, ... and biases 1, 2, ..."""
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(torch.arange(1.0, parameter.numel() + 1).reshape(parameter.shape))
    return layer


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution with round numbers."""
    layer = numbered(nn.Conv2d(inputs, outputs, size, **options))
    assert isinstance(layer, nn.Conv2d)
    return layer


def linear(inputs: int, outputs: int, **options: Any) -> nn.Linear:
    """A linear layer with round numbers."""
    layer = numbered(nn.Linear(inputs, outputs, **options))
    assert isinstance(layer, nn.Linear)
    return layer


def norm(
    gamma: Sequence[float],
    beta: Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    kind: type[nn.Module] = nn.BatchNorm2d,
) -> Any:
    """A BatchNorm with eps 0: y = gamma (x - mean) / std + beta."""
    made: Any = kind(len(gamma), eps=0.0).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor(gamma, dtype=torch.float64))
        for own, values in ((made.bias, beta), (made.running_mean, mean)):
            if values is not None:
                own.copy_(torch.tensor(values, dtype=torch.float64))
        if std is not None:
            made.running_var.copy_(torch.tensor(std, dtype=torch.float64) ** 2)
    return made
