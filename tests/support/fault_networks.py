"""Small networks to inject faults into: every kind of layer that folding knows, and some more."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

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


class LowRank(nn.Module):
    """A weight plus a product of two small ones, as LoRA has it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.randn(weight.shape[0], 2) / 4)
        self.right = nn.Parameter(torch.randn(2, weight[0].numel()) / 4)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.left @ self.right).view_as(weight)


def _looked_at(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda *_: None)


def _looked_at_before(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda *_: None)


def _changed(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _module, _args, out: 2 * out + 0.1)


def _weight_norm_of_old(layer: nn.Module) -> None:
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # it is deprecated
        weight_norm(layer)


#: What one may do to a layer so that its weight is computed, or that code runs beside it.
WAYS: dict[str, Callable[[Any], object]] = {
    "a hook that looks": _looked_at,
    "a hook before": _looked_at_before,
    "a hook that changes": _changed,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of old": _weight_norm_of_old,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of old": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "channels pruned": lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
    "bias pruned": lambda layer: prune.random_unstructured(layer, "bias", 0.3),
    "low rank": lambda layer: parametrize.register_parametrization(
        layer, "weight", LowRank(layer.weight)
    ),
}

_SHAPES = {nn.Linear: (), nn.Conv1d: (6,), nn.Conv3d: (3, 3, 3)}
_NORMS = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv3d: nn.BatchNorm3d}


def chain(kind: Any, *ways: str, norms: bool, **options: Any) -> nn.Sequential:
    """Layers of one kind, each treated in another way, with or without BatchNorms between them."""
    found: dict[str, nn.Module] = {}
    for i, way in enumerate(ways or WAYS):
        found[f"layer{i}"] = layer = kind(4, 4, **options)
        WAYS[way](layer)
        if norms:
            found[f"layer{i}_bn"] = _NORMS.get(kind, nn.BatchNorm2d)(4)
        found[f"act{i}"] = nn.ReLU()
    return nn.Sequential(OrderedDict(found))


def chain_input(kind: Any) -> tuple[Tensor, ...]:
    """An input of such a chain."""
    return (torch.randn(3, 4, *_SHAPES.get(kind, (5, 5))),)


@dataclass(frozen=True)
class Network:
    """A network, its inputs, and which BatchNorm goes into which layer.

    Attributes:
        name: Name in reports.
        build: Makes it.
        inputs: Makes an example.
        pairs: Layer -> BatchNorm behind it.
        dynamic: Dynamic shapes for the exporter.
        layers: Layers without one that faults are put into.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    pairs: dict[str, str] = field(default_factory=dict)
    dynamic: Any = ({0: "batch"},)
    layers: tuple[str, ...] = ()

    def made(self, seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The network with random weights and statistics, and an example."""
        torch.manual_seed(seed)
        return randomise(self.build(), seed), self.inputs()


def _pairs(*names: str) -> dict[str, str]:
    return {name: f"{name}_bn" for name in names}


def _tokens() -> tuple[Tensor, ...]:
    return torch.randn(2, 3, 6, 6), torch.randint(0, 20, (2, 5))


def _chained(name: str, kind: Any, *ways: str, norms: bool, **options: Any) -> Network:
    layers = [f"layer{i}" for i in range(len(ways))]
    return Network(
        name,
        lambda: chain(kind, *ways, norms=norms, **options),
        lambda: chain_input(kind),
        _pairs(*layers) if norms else {},
        layers=() if norms else tuple(layers),
    )


_SPECTRAL = ("low rank", "spectral_norm", "pruned")
_SQUARE = {"kernel_size": 3, "padding": 1}

NETWORKS = (
    Network("plain", Plain, lambda: (torch.randn(2, 3, 9, 9),), _pairs("a", "b", "c")),
    Network("residual", Residual, lambda: (torch.randn(2, 4, 7, 7),), _pairs("a", "b", "c")),
    Network("decoder", Decoder, lambda: (torch.randn(2, 6, 4, 4),), _pairs("a", "b")),
    Network("perceptron", Perceptron, lambda: (torch.randn(3, 10),), _pairs("a", "b", "c")),
    Network("signal", Signal, lambda: (torch.randn(2, 2, 24),), _pairs("a", "b")),
    Network("volume", Volume, lambda: (torch.randn(2, 1, 5, 5, 5),), _pairs("a", "b")),
    Network("mixed", Mixed, _tokens, _pairs("a"), ({0: "batch"}, {0: "batch"})),
    _chained("hooked", nn.Conv2d, "a hook that looks", "a hook before", norms=True, **_SQUARE),
    _chained("computed", nn.Conv2d, "weight_norm", "spectral_norm of old", norms=True, **_SQUARE),
    _chained("pruned", nn.Linear, "pruned", "bias pruned", "channels pruned", norms=True),
    _chained("low rank", nn.ConvTranspose2d, *_SPECTRAL, norms=True, groups=2, **_SQUARE),
    _chained("computed alone", nn.Conv2d, *_SPECTRAL, norms=False, **_SQUARE),
)
