"""Small networks to inject faults into: every kind of layer that folding knows, and some more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.laws import randomise


class Plain(nn.Module):
    """Convolutions, grouped and depthwise, with an epsilon of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.b, self.b_bn = nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.BatchNorm2d(8)
        self.c, self.c_bn = nn.Conv2d(8, 8, 3, groups=8, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a_bn(self.a(x)))
        y = torch.relu(self.b_bn(self.b(y)))
        y = torch.relu(self.c_bn(self.c(y)))
        out: Tensor = self.head(y.mean((2, 3)))
        return out


class Residual(nn.Module):
    """A block with a shortcut; the last BatchNorm stays behind an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.b_bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c, self.c_bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.kept = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a_bn(self.a(x)))
        z = nn.functional.gelu(self.b_bn(self.b(y)))
        return torch.sigmoid(self.kept(nn.functional.gelu(y + self.c_bn(self.c(z)))))


class Decoder(nn.Module):
    """Transposed convolutions, one of them square and grouped, and a leaky activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.ConvTranspose2d(6, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.b, self.b_bn = nn.ConvTranspose2d(6, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6)
        self.c = nn.ConvTranspose2d(6, 2, 3, stride=2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.leaky_relu(self.a_bn(self.a(x)), 0.1)
        y = nn.functional.leaky_relu(self.b_bn(self.b(y)), 0.1)
        return torch.tanh(self.c(y))


class Perceptron(nn.Module):
    """Linear layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Linear(10, 12), nn.BatchNorm1d(12)
        self.b, self.b_bn = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.c, self.c_bn = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.a_bn(self.a(x)))
        y = torch.sigmoid(self.b_bn(self.b(y)))
        out: Tensor = self.head(torch.sigmoid(self.c_bn(self.c(y))))
        return out


class Signal(nn.Module):
    """One-dimensional convolutions with pooling, two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8)
        self.b, self.b_bn = nn.Conv1d(8, 8, 3, dilation=2), nn.BatchNorm1d(8)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.max_pool1d(torch.relu(self.a_bn(self.a(x))), 2)
        y = torch.relu(self.b_bn(self.b(y))).mean(2)
        return self.left(y), self.right(y)


class Volume(nn.Module):
    """Three-dimensional convolutions and a bounded activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.b, self.b_bn = nn.Conv3d(6, 6, 3, padding=1), nn.BatchNorm3d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.a_bn(self.a(x)))
        return nn.functional.hardswish(self.b_bn(self.b(y))).mean((2, 3, 4))


class Mixed(nn.Module):
    """Tokens and pixels: a table, a layer norm, a slope and a scale per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.table = nn.Embedding(50, 8)
        self.slope, self.norm = nn.PReLU(8), nn.LayerNorm(8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.linspace(0.2, 1.4, 8))

    def forward(self, x: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        y = self.slope(self.a_bn(self.a(x))).mean((2, 3))
        z = self.norm(self.mix(self.table(tokens)) * self.scale + y[:, None])
        return {"tokens": z, "logits": self.head(z.mean(1))}


@dataclass(frozen=True)
class Network:
    """A network, its inputs, and which BatchNorm goes into which layer.

    Attributes:
        name: Name in reports.
        build: Makes it.
        inputs: Makes an example.
        pairs: Layer -> BatchNorm behind it.
        dynamic: Dynamic shapes for the exporter.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    pairs: dict[str, str] = field(default_factory=dict)
    dynamic: Any = ({0: "batch"},)

    def made(self, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The network with random weights and statistics, and an example."""
        torch.manual_seed(seed)
        return randomise(self.build(), seed), self.inputs()


def _pairs(*names: str) -> dict[str, str]:
    return {name: f"{name}_bn" for name in names}


def _tokens() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 6, 6), torch.randint(0, 20, (2, 5))


NETWORKS = (
    Network("plain", Plain, lambda: (torch.randn(2, 3, 9, 9),), _pairs("a", "b", "c")),
    Network("residual", Residual, lambda: (torch.randn(2, 4, 7, 7),), _pairs("a", "b", "c")),
    Network("decoder", Decoder, lambda: (torch.randn(2, 6, 4, 4),), _pairs("a", "b")),
    Network("perceptron", Perceptron, lambda: (torch.randn(3, 10),), _pairs("a", "b", "c")),
    Network("signal", Signal, lambda: (torch.randn(2, 2, 24),), _pairs("a", "b")),
    Network("volume", Volume, lambda: (torch.randn(2, 1, 5, 5, 5),), _pairs("a", "b")),
    Network("mixed", Mixed, _tokens, _pairs("a"), ({0: "batch"}, {0: "batch"})),
)
