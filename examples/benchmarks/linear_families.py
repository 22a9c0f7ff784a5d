"""Blocks that train as sums of sequences of linear maps, written as their authors write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Channels and side of the images between blocks.
WIDTH, SIDE = 64, 32


def normed(
    inputs: int, outputs: int, size: int | tuple[int, int], groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size, and a BatchNorm."""
    pads = (size // 2, size // 2) if isinstance(size, int) else (size[0] // 2, size[1] // 2)
    layer = nn.Conv2d(inputs, outputs, size, padding=pads, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Framed(nn.Module):
    """A BatchNorm, and a frame of its shift (Diverse Branch Block: `BNAndPadLayer`)."""

    def __init__(self, channels: int, pad: int = 1) -> None:
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(channels), pad

    def forward(self, x: Tensor) -> Tensor:
        """The norm, in a frame of its shift."""
        bn, pad = self.bn, self.pad
        assert bn.running_mean is not None
        assert bn.running_var is not None
        y = F.pad(bn(x), [pad] * 4)
        shift = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        shift = shift.view(1, -1, 1, 1)
        y[:, :, :pad, :] = shift
        y[:, :, -pad:, :] = shift
        y[:, :, :, :pad] = shift
        y[:, :, :, -pad:] = shift
        return y


class DiverseBranch(nn.Module):
    """3x3, 1x1, 1x1 then 3x3, 1x1 then average (Ding et al. 2021)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.origin, self.one = normed(inputs, outputs, 3), normed(inputs, outputs, 1)
        self.sequence = nn.Sequential(
            nn.Conv2d(inputs, inputs, 1, bias=False),
            Framed(inputs),
            nn.Conv2d(inputs, outputs, 3, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.average = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False),
            Framed(outputs),
            nn.AvgPool2d(3, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of four branches."""
        return F.relu(self.origin(x) + self.one(x) + self.average(x) + self.sequence(x))


class EdgeSequence(nn.Module):
    """1x1, a frame of its bias, and 3x3 or a scaled edge filter (ECBSR: `SeqConv3x3`)."""

    def __init__(self, width: int, between: int, edge: list[list[float]] | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, between, 1)
        self.edge, self.width = edge is not None, width
        self.bias = nn.Parameter(torch.randn(width) * 0.1)
        if edge is None:
            self.weight = nn.Parameter(torch.randn(width, between, 3, 3) * 0.05)
        else:
            self.weight = nn.Parameter(torch.randn(width, 1, 1, 1) * 0.1)
            self.mask = nn.Buffer(torch.tensor(edge).expand(width, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Two layers, with a frame between."""
        assert self.first.bias is not None
        y = F.pad(self.first(x), (1, 1, 1, 1), "constant", 0)
        frame = self.first.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = frame
        y[:, :, -1:, :] = frame
        y[:, :, :, 0:1] = frame
        y[:, :, :, -1:] = frame
        if not self.edge:
            return F.conv2d(y, self.weight, self.bias)
        return F.conv2d(y, self.weight * self.mask, self.bias, groups=self.width)


class Edges(nn.Module):
    """3x3, 1x1 then 3x3, three edge filters, and the identity (Zhang et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sobel = [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]
        laplace = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]
        turned = [list(row) for row in zip(*sobel, strict=True)]
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.wide = EdgeSequence(width, 2 * width)
        self.edges = nn.ModuleList(EdgeSequence(width, width, e) for e in (sobel, turned, laplace))
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of all, and the input."""
        y = self.conv(x) + self.wide(x)
        for edge in self.edges:
            y = y + edge(x)
        activated: Tensor = self.act(y + x)
        return activated


class Conv3XC(nn.Module):
    """Padding, 1x1, 3x3, 1x1, and a 1x1 beside them (SPAN, Wan et al. 2024)."""

    def __init__(self, width: int, gain: int = 2) -> None:
        super().__init__()
        self.skip = nn.Conv2d(width, width, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width * gain, 1),
            nn.Conv2d(width * gain, width * gain, 3),
            nn.Conv2d(width * gain, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sequence, and the layer beside it."""
        return F.silu(self.conv(F.pad(x, (1, 1, 1, 1))) + self.skip(x))


class Beside(nn.Module):
    """A sum of branches behind which a ReLU follows."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return F.relu(y)


class OnlineWeight(nn.Module):
    """One kernel that each forward computes from several (OREPA, Hu et al. 2022), and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.three = nn.Parameter(torch.randn(width, width, 3, 3) * 0.05)
        self.one = nn.Parameter(torch.randn(2 * width, width, 1, 1) * 0.1)
        self.behind = nn.Parameter(torch.randn(width, 2 * width, 3, 3) * 0.05)
        self.scale = nn.Parameter(torch.rand(2, width) + 0.5)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """The layer with the kernel of this moment."""
        product = torch.einsum("ti,othw->oihw", self.one[:, :, 0, 0], self.behind)
        parts = torch.stack((self.three, product))
        weight = torch.einsum("soihw,so->oihw", parts, self.scale)
        return F.relu(self.bn(F.conv2d(x, weight, padding=1)))


def repvgg() -> nn.Module:
    """3x3, 1x1 and the identity, each with a BatchNorm (Ding et al. 2021)."""
    return Beside(normed(WIDTH, WIDTH, 3), normed(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))


def acnet() -> nn.Module:
    """3x3, 1x3 and 3x1 (Ding et al. 2019)."""
    return Beside(*(normed(WIDTH, WIDTH, size) for size in (3, (3, 1), (1, 3))))


def mobileone() -> nn.Module:
    """Depthwise and pointwise, several times each (Vasu et al. 2023)."""
    depthwise = [normed(WIDTH, WIDTH, size, WIDTH) for size in (3, 3, 3, 1)]
    pointwise = [normed(WIDTH, WIDTH, 1) for _ in range(3)]
    norms = (nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH))
    return nn.Sequential(Beside(*depthwise, norms[0]), Beside(*pointwise, norms[1]))


def large_kernel() -> nn.Module:
    """A depthwise 13x13 and 5x5 between 1x1 layers (RepLKNet, Ding et al. 2022)."""
    return nn.Sequential(
        *(normed(WIDTH, WIDTH, 1), nn.ReLU()),
        Beside(normed(WIDTH, WIDTH, 13, WIDTH), normed(WIDTH, WIDTH, 5, WIDTH)),
        *(normed(WIDTH, WIDTH, 1), nn.ReLU()),
    )


def transition() -> nn.Module:
    """What stands between the blocks of a DenseNet."""
    return nn.Sequential(
        *(nn.BatchNorm2d(WIDTH), nn.ReLU()),
        *(nn.Conv2d(WIDTH, WIDTH // 2, 1, bias=False), nn.AvgPool2d(2)),
        *(normed(WIDTH // 2, WIDTH, 3), nn.ReLU()),
    )


#: One block each.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "DBB": lambda: DiverseBranch(WIDTH, WIDTH),
    "ECBSR-like": lambda: Edges(WIDTH),
    "SPAN-like": lambda: Conv3XC(WIDTH),
    "1x1(c->2c)->3x3": lambda: swept(2 * WIDTH),
    "OREPA-like": lambda: OnlineWeight(WIDTH),
    "RepVGG": repvgg,
    "ACNet": acnet,
    "MobileOne": mobileone,
    "RepLKNet-like": large_kernel,
    "DenseNet transition": transition,
}


def swept(between: int, width: int = WIDTH) -> nn.Module:
    """1x1 then 3x3 with so many channels between, and padding in front."""
    return nn.Sequential(
        *(nn.ZeroPad2d(1), nn.Conv2d(width, between, 1), nn.Conv2d(between, width, 3), nn.ReLU())
    )
