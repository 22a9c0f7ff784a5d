"""Small networks on which foldings of BatchNorm go wrong, or could do more.

Each stands for a kind that real code has: a layer called twice, a weight with two owners, a norm in
train mode, statistics of the batch. `CASES` may be put to any folding; nothing here knows bnfx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class NormRelu(nn.BatchNorm2d):
    """A BatchNorm with more in its forward than its name says."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and clip."""
        return F.relu(super().forward(x))


class DoubledConv(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice the convolution."""
        return 2 * super().forward(x)


class Net(nn.Module):
    """Layers, and what is done with them."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """What `run` says."""
        found: Tensor = self.run(self, x)
        return found


def _nothing(_: nn.Module) -> None:
    """No last touch."""


@dataclass(frozen=True)
class Case:
    """A network, and what is peculiar about it."""

    name: str
    about: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 8, 8)
    #: Modules left in train mode, or other last touches.
    touch: Callable[[nn.Module], object] = _nothing

    def build(self) -> tuple[nn.Module, Tensor]:
        """The network in eval mode with statistics that are no identity, and an input."""
        torch.manual_seed(0)
        net = self.make()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                settle(module)
        self.touch(net.eval())
        return net, torch.randn(self.shape)


def settle(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Draw statistics and an affine map."""
    for buffer, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2)):
        if buffer is not None:
            nn.init.uniform_(buffer, low, high)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)


def conv(i: int = 3, o: int = 4, k: int = 3, **options: object) -> nn.Conv2d:
    """A convolution."""
    return nn.Conv2d(i, o, k, **options)  # type: ignore[arg-type]  # whatever a case needs


def norm(n: int = 4, **options: object) -> nn.BatchNorm2d:
    """A BatchNorm."""
    return nn.BatchNorm2d(n, **options)  # type: ignore[arg-type]  # whatever a case needs


def _tied() -> nn.Module:
    net = Net(
        lambda m, x: m.bn1(m.a(x)) + m.bn2(m.b(x)), a=conv(), b=conv(), bn1=norm(), bn2=norm()
    )
    net.get_submodule("b").weight = net.get_submodule("a").weight
    return net


def _hooked() -> nn.Module:
    net = nn.Sequential(conv(), norm())
    net[1].register_forward_hook(lambda _m, _x, y: y.clamp(-1, 1))
    return net


def _functional(m: Any, x: Tensor) -> Tensor:
    bn, y = m.bn, m.a(x)
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=0.1)


def _grouped_transpose() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), norm(6))


def _negative(net: nn.Module) -> None:
    with torch.no_grad():
        net.get_parameter("1.weight").neg_()


def _zero(net: nn.Module) -> None:
    with torch.no_grad():
        net.get_parameter("0.weight")[0] = 0


def _preactivation() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.stem(x)
        y = y + m.a(m.bn1(y).relu())
        return m.head(m.bn2(y))

    return Net(run, stem=conv(), bn1=norm(), a=conv(4, 4, 1), bn2=norm(), head=conv(4, 2, 1))


def _joined() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        return m.bn(torch.cat((m.a(x), m.b(x)), 1))

    return Net(run, a=conv(), b=conv(), bn=norm(8))


def _aliased() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.bn(y)
        return z + y.relu_()

    return Net(run, a=conv(), bn=norm())


CASES = (
    Case("behind a convolution", "what everybody folds", lambda: nn.Sequential(conv(), norm())),
    Case(
        "behind a linear layer",
        "BatchNorm1d of features",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
        (3, 5),
    ),
    Case(
        "a linear layer over rows",
        "BatchNorm1d normalises axis 1, the layer gives axis 2",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(4)),
        (3, 4, 5),
    ),
    Case(
        "one and three dimensions",
        "Conv3d",
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)),
        (2, 2, 4, 4, 4),
    ),
    Case(
        "depthwise",
        "as many groups as channels",
        lambda: nn.Sequential(conv(3, 6, groups=3), norm(6)),
    ),
    Case(
        "padding by reflection",
        "the shift passes it",
        lambda: nn.Sequential(conv(padding=1, padding_mode="reflect"), norm()),
    ),
    Case(
        "a transposed convolution",
        "channels are axis 1 of the weight",
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), norm()),
    ),
    Case(
        "a transposed convolution with groups",
        "channels are split over both axes",
        _grouped_transpose,
        (2, 4, 8, 8),
    ),
    Case(
        "no affine map",
        "gamma and beta are missing",
        lambda: nn.Sequential(conv(), norm(affine=False)),
    ),
    Case(
        "no statistics",
        "eval uses the batch's",
        lambda: nn.Sequential(conv(), norm(track_running_stats=False)),
    ),
    Case(
        "in train mode",
        "one BatchNorm was left in it",
        lambda: nn.Sequential(conv(), norm()),
        touch=lambda net: net.get_submodule("1").train(),
    ),
    Case("an eps of its own", "0.5 in place of 1e-5", lambda: nn.Sequential(conv(), norm(eps=0.5))),
    Case(
        "the function", "F.batch_norm with tensors", lambda: Net(_functional, a=conv(), bn=norm())
    ),
    Case(
        "a BatchNorm that clips",
        "a subclass with a ReLU inside",
        lambda: nn.Sequential(conv(), NormRelu(4)),
    ),
    Case(
        "a convolution that doubles",
        "a subclass with a forward of its own",
        lambda: nn.Sequential(DoubledConv(3, 4, 3), norm()),
    ),
    Case("a hook that clips", "on the BatchNorm", _hooked),
    Case(
        "weight norm",
        "the weight is computed",
        lambda: nn.Sequential(parametrizations.weight_norm(conv()), norm()),
    ),
    Case(
        "dropout between",
        "the identity in eval",
        lambda: nn.Sequential(conv(), nn.Dropout(), norm()),
    ),
    Case(
        "two BatchNorms in a row",
        "both behind one convolution",
        lambda: nn.Sequential(conv(), norm(), norm()),
    ),
    Case(
        "a convolution called twice",
        "with a BatchNorm for each call",
        lambda: Net(
            lambda m, x: m.bn1(m.a(x)) + m.bn2(m.a(x.flip(3))), a=conv(), bn1=norm(), bn2=norm()
        ),
    ),
    Case(
        "a convolution read twice",
        "by a BatchNorm, and plainly",
        lambda: Net(lambda m, x: (lambda y: m.bn(y) + y.sigmoid())(m.a(x)), a=conv(), bn=norm()),
    ),
    Case(
        "a BatchNorm called twice",
        "behind two convolutions",
        lambda: Net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=conv(), b=conv(), bn=norm()),
    ),
    Case("one weight, two layers", "a parameter with two owners", _tied),
    Case(
        "written in place", "what the convolution gives is changed behind the BatchNorm", _aliased
    ),
    Case(
        "before a convolution",
        "without padding",
        lambda: nn.Sequential(nn.Sigmoid(), norm(3), conv()),
    ),
    Case(
        "before a padded convolution",
        "zeros stand where the shift should be",
        lambda: nn.Sequential(nn.Sigmoid(), norm(3), conv(padding=1)),
    ),
    Case(
        "before a padded one, negative scale",
        "the same behind a ReLU",
        lambda: nn.Sequential(conv(3, 4), norm(), nn.ReLU(), conv(4, 2, padding=1)),
        touch=_negative,
    ),
    Case(
        "a gamma of zero",
        "a channel is a constant",
        lambda: nn.Sequential(norm(3), conv()),
        touch=_zero,
    ),
    Case(
        "pooling between",
        "an average keeps scale and shift",
        lambda: nn.Sequential(conv(), nn.AvgPool2d(2), norm()),
    ),
    Case(
        "max pooling between",
        "a negative scale turns it round",
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2), norm()),
        touch=lambda net: _flip(net, "2"),
    ),
    Case("behind a concatenation", "of two convolutions", _joined),
    Case("pre-activation", "a residual stream with two BatchNorms", _preactivation),
)


def _flip(net: nn.Module, name: str) -> None:
    with torch.no_grad():
        net.get_parameter(f"{name}.weight")[0].neg_()
