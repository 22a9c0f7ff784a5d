"""Networks of the examples, most of them written without BatchNorm: bnfx inserts it."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sigmoid_mlp(
    width: int = 64, depth: int = 6, *, inputs: int = 64, std: float | None = None
) -> nn.Module:
    """A perceptron of sigmoids, (N, ...) with `inputs` pixels -> (N, 10).

    Deep ones are hard to train without BatchNorm. With `std`, weights are drawn from a normal
    distribution of that standard deviation and biases are zero; else they are torch's.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i in range(1, depth + 1):
        layers[f"fc{i}"] = nn.Linear(inputs if i == 1 else width, width)
        layers[f"sigmoid{i}"] = nn.Sigmoid()
    layers["head"] = nn.Linear(width, 10)
    net = nn.Sequential(layers)
    if std is not None:
        for layer in net.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
    return net


def classic_convnet(
    channels: int, side: int, activation: type[nn.Module], width: int = 8
) -> nn.Module:
    """A network of the time before BatchNorm, (N, channels, side, side) -> (N, 10).

    Convolutions, local response normalisation, Dropout: what section 4.2.1 of the paper removes.
    """
    left = side // 4
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, width, 5, stride=2, padding=2),
            act1=activation(),
            lrn=nn.LocalResponseNorm(5),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
            act2=activation(),
            pool=nn.MaxPool2d(2),
            conv3=nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            act3=activation(),
            flatten=nn.Flatten(),
            fc=nn.Linear(2 * width * left * left, 8 * width),
            act4=activation(),
            dropout=nn.Dropout(0.4),
            head=nn.Linear(8 * width, 10),
        )
    )


class ConvNet(nn.Module):
    """A residual block, a depthwise and a transposed convolution, (N, 1, 8, 8) -> (N, 10)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, groups=width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.head = nn.Linear(width * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of 8x8 images."""
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block2(F.relu(self.block1(x))))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.up(x))
        logits: Tensor = self.head(torch.flatten(F.max_pool2d(x, 2), 1))
        return logits


class SlimNet(nn.Module):
    """A small residual network with more channels than it needs; gammas start at a half."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = _normed(1, width, 2)
        self.first, self.second = _normed(width, width, 1), _normed(width, width, 1)
        self.down, self.last = _normed(width, 2 * width, 2), _normed(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, classes)."""
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        x = self.last(self.down(x).relu()).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _normed(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, 0.5)
    return nn.Sequential(layer, norm)
