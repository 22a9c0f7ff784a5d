"""Every case that some tool folds wrongly, by name.

Outputs must be right always. Where the rules of folding leave no doubt, the test also says how many
BatchNorms go or stay: by the rules, a fold needs no operator that was not there before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

import bnfx
from tests.support.graph_laws import Outcome, check, options_of_fold_bn
from tests.support.graphs import DoubledConv, NormRelu

IMAGE = (2, 4, 6, 6)
SQUARE = (4, 4, 4, 4)  # batch, channels, height and width agree: whatever broadcasts wrongly, fits


class Net(nn.Module):
    """Layers by name and a forward that reads like a case."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.case = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.case(self, x)


@dataclass(frozen=True)
class Trap:
    """A network, its input, and how many BatchNorms must stay at least and at most."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    least: int = 0
    most: int = 1


def conv(out: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, out, k, **{"padding": k // 2, **options})


def bn(channels: int = 4, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def statistics(net: nn.Module) -> nn.Module:
    """Random statistics and positive gammas, in float64; in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for norm in net.modules():
            if not isinstance(norm, _BatchNorm | nn.InstanceNorm2d):
                continue
            for tensor in (norm.running_mean, norm.bias):
                if tensor is not None:
                    tensor.normal_()
            for tensor in (norm.running_var, norm.weight):
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5)
    return net.double().eval()


def negative(net: nn.Module) -> nn.Module:
    """`net` with every other gamma negative, once its statistics are drawn."""
    statistics(net)
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, _BatchNorm):
                norm.weight[::2] *= -1
    return net


def held(trap: Trap, *, given: bool, net: nn.Module | None = None, **options: Any) -> Outcome:
    """The laws on the trap's network."""
    net = net or statistics(trap.build())
    inputs = (torch.randn(trap.shape, dtype=torch.float64),)
    return check(net, inputs, given=given, **options)


def bias_of_rank_two() -> nn.Linear:
    """A linear layer whose bias is a matrix that broadcasts over the batch."""
    linear = nn.Linear(4, 4)
    linear.bias = nn.Parameter(torch.randn(4, 4))
    return linear


class ReluNorm(nn.BatchNorm2d):
    """A forward of its own: the model around it goes through torch.export."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4, H, W) -> the same."""
        return super().forward(x).relu()


def read_after_training(m: Any, x: Tensor) -> Tensor:
    m.train_mode(x)
    out: Tensor = m.norm(m.conv(x) + m.train_mode.running_mean.mean())
    return out


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.add_(1)
    return m.bn(y)  # type: ignore[no-any-return]  # modules by name are untyped


def in_place_operator(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    z: Tensor = y.view(-1)
    y += 1
    return z


def view_written(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :2].mul_(3)
    return m.bn(y)  # type: ignore[no-any-return]


def written_after(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.conv(x)
    z = m.bn(y)
    y.zero_()
    return z, y


def relu_in_place_on_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    F.relu_(y.flatten(1))
    return m.bn(y)  # type: ignore[no-any-return]


def tied_parameter() -> nn.Module:
    net = Net(lambda m, x: m.b(m.second(F.gelu(m.a(m.first(x))))),
              first=conv(), second=conv(), a=bn(), b=bn())  # fmt: skip
    net.get_submodule("second").register_parameter("weight", net.get_parameter("first.weight"))
    return net


def two_names() -> nn.Module:
    one = conv()
    return Net(lambda m, x: m.b(m.v(F.gelu(m.a(m.u(x))))), u=one, v=one, a=bn(), b=bn())


def tied_decoder() -> nn.Module:
    return Net(lambda m, x: F.linear(F.gelu(m.bn(m.fc(x))), m.fc.weight.t()),
               fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))  # fmt: skip


def computed_channels(m: Any, x: Tensor) -> Tensor:
    """Which channels are taken depends on the data."""
    y = m.bn(m.conv(x))
    order = y.mean((0, 2, 3)).argsort()
    return m.out(y[:, order])  # type: ignore[no-any-return]


#: By the name of the mistake.
TRAPS: dict[str, Trap] = {
    "bias of rank two": Trap(lambda: Net(
        lambda m, x: m.bn(m.linear(x)), linear=bias_of_rank_two(), bn=nn.BatchNorm1d(4)),
        (4, 4), least=1),
    "bias of rank two in a sum": Trap(lambda: Net(
        lambda m, x: m.linear(x) + m.other(x), linear=bias_of_rank_two(), other=nn.Linear(4, 4)),
        (4, 4), most=0),
    "weight that is a vector": Trap(lambda: Net(
        lambda m, x: F.linear(m.bn(x), m.linear.bias) + F.linear(m.linear(x), m.linear.bias),
        linear=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)), (4, 4), least=1),
    # who else sees it
    "conv called twice": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(F.gelu(m.bn(m.conv(x))))), conv=conv(), bn=bn()), most=0),
    "conv with one bare use": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(m.conv(x))) + m.conv(x), conv=conv(), bn=bn()), most=0),
    "conv under two names": Trap(two_names, most=0),
    "one Parameter in two convs": Trap(tied_parameter, most=0),
    "tied decoder": Trap(tied_decoder, (3, 4), most=0),
    "norm of the weight": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)) * m.conv.weight.norm(), conv=conv(), bn=bn()), most=0),
    "output used elsewhere": Trap(lambda: Net(
        lambda m, x: m.bn(y := m.conv(x)) + F.gelu(y), conv=conv(), bn=bn()), least=1),
    "output returned too": Trap(lambda: Net(
        lambda m, x: (m.bn(y := m.conv(x)), y), conv=conv(), bn=bn()), least=1),
    "norm returned too": Trap(lambda: Net(
        lambda m, x: (m.out(y := m.bn(x)), y), bn=bn(), out=conv(k=1)), least=1),
    "two norms of one conv": Trap(lambda: Net(
        lambda m, x: F.gelu(m.a(y := m.conv(x))) + F.gelu(m.b(y)), conv=conv(), a=bn(), b=bn()),
        least=1, most=2),
    "statistics read elsewhere": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(), conv=conv(), bn=bn()), most=0),
    "statistics broadcast elsewhere": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)) * m.bn.running_var, conv=conv(), bn=bn()), SQUARE, most=0),
    "norm on two inputs": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(m.conv(x))) + F.gelu(m.bn(x)), conv=conv(), bn=bn()),
        least=1, most=1),
    # writes
    "in place": Trap(lambda: Net(in_place, conv=conv(), bn=bn())),
    "in-place operator behind a view": Trap(lambda: Net(in_place_operator, conv=conv(), bn=bn())),
    "view written": Trap(lambda: Net(view_written, conv=conv(), bn=bn())),
    "written after the norm": Trap(lambda: Net(written_after, conv=conv(), bn=bn())),
    "relu in place on a view": Trap(lambda: Net(relu_in_place_on_a_view, conv=conv(), bn=bn())),
    # axes
    "linear on (N, L, C) with L == C": Trap(lambda: Net(
        lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)), (3, 4, 4), least=1),
    "linear behind a norm on (N, C, L)": Trap(lambda: Net(
        lambda m, x: m.fc(m.bn(x)), fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)), (3, 4, 4), least=1),
    "unbatched conv1d": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=nn.Conv1d(4, 5, 3, padding=1), bn=nn.BatchNorm1d(5)),
        (4, 5), least=1),
    "unbatched conv2d": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=nn.BatchNorm1d(4)), (4, 4, 4), least=1),
    "flattened (N, L, C)": Trap(lambda: Net(
        lambda m, x: m.bn((y := m.fc(x)).flatten(0, 1)).reshape_as(y),
        fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)), (3, 4, 4), most=0),
    "transposed, groups": Trap(lambda: Net(
        lambda m, x: m.bn(m.up(x)), up=nn.ConvTranspose2d(4, 4, 3, groups=2), bn=bn()), most=0),
    "transposed, square weight": Trap(lambda: Net(
        lambda m, x: m.bn(m.up(x)), up=nn.ConvTranspose2d(4, 4, 3), bn=bn()), most=0),
    "transposed, depthwise": Trap(lambda: Net(
        lambda m, x: m.bn(m.up(x)), up=nn.ConvTranspose2d(4, 8, 3, groups=4), bn=bn(8)), most=0),
    "constant along W with W == C": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(m.conv(x)) * m.k.weight), conv=conv(), bn=bn(), k=bn(),
        out=conv(k=1)), SQUARE, most=0),
    "added along W with W == C": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x) + m.k.bias), conv=conv(), bn=bn(), k=bn()), SQUARE),
    "scalar constant": Trap(lambda: Net(
        lambda m, x: m.bn(2 * m.conv(x) + 1), conv=conv(), bn=bn())),
    "channels flattened into features": Trap(lambda: Net(
        lambda m, x: m.fc(m.bn(x).flatten(1)), bn=bn(), fc=nn.Linear(64, 3)), SQUARE, most=0),
    "channels by data": Trap(lambda: Net(
        computed_channels, conv=conv(), bn=bn(), out=conv(k=1)), most=0),
    "channels shuffled": Trap(lambda: Net(
        lambda m, x: m.out(F.channel_shuffle(m.bn(x), 2)), bn=bn(), out=conv(k=1)), most=0),
    "channels flipped": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x).flip(1)), bn=bn(), out=conv(k=1))),
    "channels to space": Trap(lambda: Net(
        lambda m, x: m.out(F.pixel_shuffle(m.bn(x), 2)), bn=bn(), out=nn.Conv2d(1, 3, 1)), least=1),
    "grouped conv behind": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=nn.Conv2d(4, 6, 1, groups=2)), most=0),
    "depthwise behind": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=nn.Conv2d(4, 8, 3, groups=4)), most=0),
    "grouped transposed behind": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=nn.ConvTranspose2d(4, 6, 1, groups=2)), most=0),
    "cumulative sum over channels": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x).cumsum(1)), bn=bn(), out=conv(k=1)), least=1),
    "sorted": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x).sort(1)[0]), bn=bn(), out=conv(k=1)), least=1),
    # padding
    "before a zero-padded conv": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv()), least=1),
    "before an unpadded conv": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(padding=0)), most=0),
    "before padding 'same'": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(padding="same")), least=1),
    "before padding 'same' of one": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(k=1, padding="same")), most=0),
    "before padding 'valid'": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(padding="valid")), most=0),
    "before asymmetric zero padding": Trap(lambda: Net(
        lambda m, x: m.out(F.pad(m.bn(x), (1, 0, 0, 1))), bn=bn(), out=conv(padding=0)), least=1),
    "before padding with a number": Trap(lambda: Net(
        lambda m, x: m.out(F.pad(m.bn(x), (1, 1), value=0.5)), bn=bn(), out=conv(padding=0)),
        least=1),
    "behind padding": Trap(lambda: Net(
        lambda m, x: m.bn(F.pad(m.conv(x), (1, 1))), conv=conv(), bn=bn()), least=1),
    "cropped by negative padding": Trap(lambda: Net(
        lambda m, x: m.out(F.pad(m.bn(x), (-1, -1, -1, -1))), bn=bn(), out=conv(padding=0))),
    "padded channels": Trap(lambda: Net(
        lambda m, x: m.out(F.pad(m.bn(x), (0, 0, 0, 0, 1, 1))), bn=bn(), out=nn.Conv2d(6, 4, 1))),
    "before a strided transposed conv": Trap(lambda: Net(
        lambda m, x: m.up(m.bn(x)), bn=bn(), up=nn.ConvTranspose2d(4, 4, 2, stride=3)), least=1),
    "before a transposed conv": Trap(lambda: Net(
        lambda m, x: m.up(m.bn(x)), bn=bn(), up=nn.ConvTranspose2d(4, 4, 3)), least=1),
    "before reflect padding": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(padding_mode="reflect")), most=0),
    "before replicate padding": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(padding_mode="replicate")), most=0),
    "before circular padding": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x)), bn=bn(), out=conv(padding_mode="circular")), most=0),
    "unfolded with padding": Trap(lambda: Net(
        lambda m, x: m.out(F.unfold(m.bn(x), 3, padding=1).mT), bn=bn(), out=nn.Linear(36, 4)),
        least=1),
    # pooling
    "before an average pool that counts padding": Trap(lambda: Net(
        lambda m, x: m.out(F.avg_pool2d(m.bn(x), 3, 1, 1)), bn=bn(), out=conv(k=1)), least=1),
    "before an average pool that does not": Trap(lambda: Net(
        lambda m, x: m.out(F.avg_pool2d(m.bn(x), 3, 1, 1, count_include_pad=False)), bn=bn(),
        out=conv(k=1)), most=0),
    "before an average pool with a divisor": Trap(lambda: Net(
        lambda m, x: m.out(F.avg_pool2d(m.bn(x), 2, divisor_override=3)), bn=bn(),
        out=conv(k=1)), least=1),
    "before a sum over space": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x).sum((2, 3))), bn=bn(), out=nn.Linear(4, 4)), least=1),
    "before a mean over channels": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x).mean(1, keepdim=True)), bn=bn(), out=nn.Conv2d(1, 4, 1)),
        least=1),
    "before an lp pool": Trap(lambda: Net(
        lambda m, x: m.out(F.lp_pool2d(m.bn(x), 2, 2)), bn=bn(), out=conv(k=1)), least=1),
    # activations
    "relu between": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(F.relu(m.conv(x)))), conv=conv(), bn=bn()), least=1),
    "gelu between": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(F.gelu(m.conv(x)))), conv=conv(), bn=bn()), least=1),
    "softmax over channels behind": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(x).softmax(1)), bn=bn(), out=conv(k=1)), least=1),
    # the norm itself
    "subclass with an activation": Trap(lambda: Net(
        lambda m, x: m.out(m.bn(m.conv(x))), conv=conv(), bn=NormRelu(4), out=conv())),
    "no running statistics": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(track_running_stats=False)), least=1),
    "not affine": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(affine=False)), most=0),
    "only gamma": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(bias=False)), most=0),
    "only beta": Trap(lambda: Net(
        lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, None, m.bn.bias),
        conv=conv(), bn=bn()), most=0),
    "large eps": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(eps=0.7)), most=0),
    "conv without bias": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(bias=False), bn=bn()), most=0),
    "functional, train mode by default of torch.batch_norm": Trap(lambda: Net(
        lambda m, x: F.batch_norm(m.conv(x), None, None, m.bn.weight, m.bn.bias, training=True),
        conv=conv(), bn=bn()), least=1),
    "instance norm with running statistics": Trap(lambda: Net(
        lambda m, x: F.gelu(m.n(m.conv(x))), conv=conv(),
        n=nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), least=0, most=1),
    "instance norm of the input": Trap(lambda: Net(
        lambda m, x: F.gelu(m.n(m.conv(x))), conv=conv(), n=nn.InstanceNorm2d(4, affine=True))),
    # the layer itself
    "weight norm": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=parametrizations.weight_norm(conv()), bn=bn())),
    "spectral norm": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=parametrizations.spectral_norm(conv()), bn=bn())),
    "a subclass with a forward of its own": Trap(lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=DoubledConv(4, 4, 3), bn=bn())),
    # streams
    "residual around a norm": Trap(lambda: Net(
        lambda m, x: F.gelu((y := m.conv(x)) + m.bn(y)), conv=conv(), bn=bn()), least=1),
    "difference": Trap(lambda: Net(
        lambda m, x: F.gelu(m.a(m.u(x)) - m.b(m.v(x))), u=conv(), v=conv(), a=bn(), b=bn()),
        most=0),
    "gate": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(m.conv(x)) * torch.sigmoid(m.g(x))), conv=conv(), bn=bn(),
        g=conv()), most=0),
    "square": Trap(lambda: Net(
        lambda m, x: m.out((y := m.bn(x)) * y), bn=bn(), out=conv(k=1)), least=1),
    "product with itself, scaled": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn((y := m.conv(x)) * y)), conv=conv(), bn=bn())),
    "concat, then norm": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(torch.cat([m.u(x), m.v(x)], 1))), u=conv(), v=conv(), bn=bn(8))),
    "concat with the input, then norm": Trap(lambda: Net(
        lambda m, x: F.gelu(m.bn(torch.cat([m.u(x), x], 1))), u=conv(), bn=bn(8)), least=1),
    "stack, then sum": Trap(lambda: Net(
        lambda m, x: m.bn(torch.stack([m.u(x), m.v(x)]).sum(0)), u=conv(), v=conv(), bn=bn())),
}  # fmt: skip


@pytest.mark.parametrize("given", [False, True], ids=["traced", "with inputs"])
@pytest.mark.parametrize("name", TRAPS)
def test_trap(name: str, given: bool) -> None:  # noqa: FBT001  # drawn by pytest
    trap = TRAPS[name]
    outcome = held(trap, given=given, merge_linear=False)  # the next test merges, too
    assert outcome.status in ("ok", "refused", "guarded")
    if outcome.status == "ok":
        assert trap.least <= outcome.left
        if given:
            assert outcome.left <= trap.most


@pytest.mark.parametrize("name", TRAPS)
def test_trap_with_negative_gammas_and_every_option(name: str) -> None:
    trap = TRAPS[name]
    torch.manual_seed(0)
    net = trap.build()
    if any(isinstance(m, _BatchNorm) and m.weight is None for m in net.modules()):
        pytest.skip("a BatchNorm of this case has no gamma")
    options = dict.fromkeys(options_of_fold_bn(given=True), True)
    held(trap, given=True, net=negative(net), **options)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ReluNorm])
def test_statistics_that_a_norm_in_train_mode_writes_are_no_constants(
    norm: type[nn.BatchNorm2d],
) -> None:
    net = statistics(Net(read_after_training, conv=conv(), norm=norm(4), train_mode=bn()))
    net.get_submodule("train_mode").train()
    x = torch.randn(IMAGE, dtype=torch.float64)
    folded = bnfx.fold_bn(net, x)
    theirs, ours = copy.deepcopy(net)(x), copy.deepcopy(folded)(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
