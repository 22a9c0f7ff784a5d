"""Random networks with channels that count for nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

WIDTH = 8


class Unit(nn.Module):
    """Convolution, BatchNorm, activation; depthwise or grouped where asked."""

    def __init__(self, rng: random.Random, ins: int, outs: int, groups: int = 1) -> None:
        super().__init__()
        size = rng.choice((1, 3))
        padding = rng.choice((0, size // 2)) if size == 1 else 1
        modes: tuple[Literal["zeros", "reflect"], ...] = ("zeros", "zeros", "reflect")
        mode = rng.choice(modes)
        self.conv = nn.Conv2d(
            ins,
            outs,
            size,
            padding=padding,
            groups=groups,
            bias=rng.random() < 0.5,
            padding_mode=mode,
        )
        self.norm = nn.BatchNorm2d(outs) if rng.random() < 0.8 else nn.Identity()
        self.act = rng.choice((nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.Identity(), nn.PReLU(outs)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ins, H, W) -> (N, outs, H, W)."""
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class Residual(nn.Module):
    """A block beside the stream, behind an activation or not."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.first, self.second = Unit(rng, WIDTH, 16), Unit(rng, 16, WIDTH)
        self.after = rng.choice((nn.ReLU(), nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        """The stream."""
        out: Tensor = self.after(x + self.second(self.first(x)))
        return out


class Gated(nn.Module):
    """Squeeze and excitation around a depthwise layer."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.wide, self.deep = Unit(rng, WIDTH, 16), Unit(rng, 16, 16, groups=16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.narrow = Unit(rng, 16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The stream, replaced."""
        x = self.deep(self.wide(x))
        n, c = x.size(0), x.size(1)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        out: Tensor = self.narrow(x * gate.view(n, c, 1, 1))
        return out


class Joined(nn.Module):
    """Branches that are concatenated, one of them pooled."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.a, self.b, self.c = (Unit(rng, WIDTH, n) for n in (4, 6, 6))
        self.last = Unit(rng, 16 + WIDTH, WIDTH)
        self.pool = rng.choice((nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """The stream, replaced."""
        out: Tensor = self.last(torch.cat((self.a(x), self.pool(self.b(x)), self.c(x), x), 1))
        return out


class Halved(nn.Module):
    """Halves that are multiplied, or shuffled."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.how = rng.choice(("glu", "chunk", "split", "shuffle", "slice"))
        self.wide = Unit(rng, WIDTH, 16)
        self.narrow = Unit(rng, 16 if self.how == "shuffle" else 8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The stream, replaced."""
        x = self.wide(x)
        if self.how == "glu":
            x = F.glu(x, 1)
        elif self.how == "chunk":
            a, b = x.chunk(2, 1)
            x = a * b
        elif self.how == "split":
            a, b = torch.split(x, [8, 8], 1)
            x = torch.maximum(a, b)
        elif self.how == "slice":
            x = x[:, :8] - x[:, 8:]
        else:
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        out: Tensor = self.narrow(x)
        return out


class Grouped(nn.Module):
    """A grouped convolution between dense ones."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            Unit(rng, WIDTH, 16), Unit(rng, 16, 16, groups=rng.choice((2, 4))), Unit(rng, 16, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The stream, replaced."""
        out: Tensor = self.parts(x)
        return out


class Up(nn.Module):
    """A transposed convolution behind a pool, or interpolation."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.first = Unit(rng, WIDTH, 16)
        self.up = nn.ConvTranspose2d(16, WIDTH, 2, stride=2, groups=rng.choice((1, 2)))
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The stream, replaced."""
        out: Tensor = self.up(F.max_pool2d(self.first(x), 2)) * self.scale
        return out


BLOCKS: tuple[Callable[[random.Random], nn.Module], ...] = (
    Residual,
    Gated,
    Joined,
    Halved,
    Grouped,
    Up,
)


class Network(nn.Module):
    """A stem, some blocks, and a head over the flattened picture or over its mean."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.stem = Unit(rng, 3, WIDTH)
        self.blocks = nn.Sequential(*(rng.choice(BLOCKS)(rng) for _ in range(rng.randint(1, 3))))
        self.mean = rng.random() < 0.5
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) -> (N, 5)."""
        x = self.blocks(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 1) if self.mean else x
        out: Tensor = self.head(x.flatten(1))
        return out


def sparse_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A network in float64 in eval mode, and an input."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = Network(rng).double().eval()
    net(x)
    with torch.no_grad():
        for module in net.modules():
            _thin(module, rng)
    return net, x


def _thin(module: nn.Module, rng: random.Random) -> None:
    """Zeros in rows and columns of weights, gammas and betas."""

    def some(count: int, rate: float) -> Tensor:
        return torch.tensor([rng.random() < rate for _ in range(count)])

    if isinstance(module, _BatchNorm):
        assert module.running_mean is not None
        assert module.running_var is not None
        for part in (module.running_mean, module.bias):
            nn.init.normal_(part)
        nn.init.uniform_(module.running_var, 0.5, 2)
        dead = some(len(module.weight), 0.5)
        module.weight[dead] = 0.0
        module.bias[dead & some(len(dead), 0.5)] = 0.0
    if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d) and rng.random() < 0.5:
        rows = some(len(module.weight), 0.4)
        module.weight[rows] = 0.0
        module.weight[:, some(module.weight.shape[1], 0.4)] = 0.0
        if module.bias is not None:
            module.bias[some(len(module.bias), 0.4)] = 0.0
