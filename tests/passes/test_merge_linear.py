"""Laws of merging linear maps: whatever is merged is exact, at every size, and costs less."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfx
from bnfx.reports.report import FoldReport
from tests.support.laws import assert_close, check_fold, randomise
from tests.support.networks import net

#: A width to which all others round: layers cost by their kernels and places alone.
WIDE = 4096


class Beside(nn.Module):
    """The sum of branches of one tensor."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def merges(model: nn.Module, *inputs: Tensor, block: int = 16) -> int:
    """How many merges `fold_bn` makes; the result computes the same for all inputs."""
    model, inputs = model.double().eval(), tuple(x.double() for x in inputs)
    folded = bnfx.fold_bn(model, inputs[0], block=block)
    for x in inputs:
        assert_close(model, folded, [x])
    told = bnfx.report(folded)
    assert isinstance(told, FoldReport)
    return len(told.merges)


def kernels(rng: random.Random, spatial: int, inputs: int, outputs: int) -> nn.Module:
    """A convolution with a geometry drawn at random."""
    convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    groups = rng.choice([g for g in (1, 1, 2, 4) if inputs % g == 0 == outputs % g])
    draw = [[rng.choice(which) for _ in range(spatial)] for which in ((1, 1, 2, 3), (1, 1, 2))]
    pads = [rng.choice((0, 0, 1, 2)) for _ in range(spatial)]
    dilation = [rng.choice((1, 1, 2)) for _ in range(spatial)]
    bias = rng.random() < 0.4
    return convolution(  # type: ignore[no-any-return]  # one of three classes
        inputs, outputs, draw[0], draw[1], pads, tuple(dilation), groups=groups, bias=bias
    )


def layers(rng: random.Random, spatial: int) -> Iterator[nn.Module]:
    """Linear maps behind each other, drawn at random."""
    width, window = rng.choice((2, 4)), (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[spatial - 1]
    pads = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)[spatial - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1]
    yield kernels(rng, spatial, 4, width)
    for _ in range(rng.choice((1, 2, 3))):
        kind = rng.choice("cccpzn")
        if kind == "c":
            after = rng.choice((2, 4))
            yield kernels(rng, spatial, width, after)
            width = after
        elif kind == "p":
            yield window(2, 1, rng.choice((0, 1)))
        else:
            yield pads(1) if kind == "z" else norm(width)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_random_sequences_are_exact(spatial: int) -> None:
    rng, merged = random.Random(spatial), 0
    torch.manual_seed(spatial)
    for _ in range(25):
        model = randomise(nn.Sequential(*layers(rng, spatial)))
        inputs = [torch.randn(1, 4, *[n] * spatial) for n in (15, 18)]
        merged += merges(model, *inputs, block=WIDE)
    assert merged > 5


def test_random_branches_are_exact() -> None:
    rng, merged = random.Random(7), 0
    torch.manual_seed(7)
    for _ in range(25):
        stride, width = rng.choice((1, 1, 2)), rng.choice((2, 4, 8))

        def convolution(inputs: int, outputs: int, k: Any, s: int = 1, p: Any = 0) -> nn.Module:
            bias = rng.random() < 0.3  # called in this round
            return nn.Conv2d(inputs, outputs, k, s, p, bias=bias)

        branches: list[nn.Module] = [
            nn.Sequential(convolution(4, width, 1), convolution(width, 4, 3, stride, 1)),
            nn.Sequential(convolution(4, 4, 1), nn.AvgPool2d(3, stride, 1), nn.BatchNorm2d(4)),
            nn.Sequential(convolution(4, 4, (1, 3), stride, (0, 1)), nn.BatchNorm2d(4)),
            nn.Sequential(
                nn.ZeroPad2d(1), convolution(4, width, 1), convolution(width, 4, 3, stride)
            ),
            convolution(4, 4, 1, stride),
        ]
        chosen = rng.sample(branches, rng.choice((2, 3, 4)))
        model = randomise(nn.Sequential(Beside(*chosen), nn.ReLU()))
        merged += merges(model, *(torch.randn(2, 4, n, n) for n in (11, 14)), block=WIDE)
    assert merged > 5


#: What is returned, of x (2, 4, 6, 6), the layers, and how many merges there are.
WAYS: dict[str, tuple[str, dict[str, Any], int]] = {
    "a value that is read twice": ("self.b(y := self.a(x)) * y.sum()", {}, 0),
    "a size that is read": ("self.b(y := self.a(x)) * y.shape[2]", {}, 0),
    "in-place maps between": ("self.b(self.a(x).add_(1).mul_(2))", {}, 1),
    "an input that is written later": (
        "[y := self.a(x), x.add_(1), self.b(y) + x[..., 1:-1, 1:-1]][-1]",
        {},
        0,
    ),
    "an input that is written between branches": (
        "[y := self.a(x), x.add_(1), y + self.b(x)][-1]",
        {"b": {"padding": 1}},
        0,
    ),
    "an element that is assigned": ("[y := self.a(x), y[:, 0].zero_(), self.b(y)][-1]", {}, 0),
    "one twice in a sum": ("self.b((y := self.a(x)) + y)", {}, 1),
    "subtracted from a number": ("self.b(1 - self.a(x))", {}, 1),
    "rsub": ("self.b(torch.rsub(self.a(x), 2.0))", {}, 1),
    "divided": ("self.b(self.a(x) / 3)", {}, 1),
    "a multiple in a sum": ("self.b(torch.add(self.a(x), x, alpha=2))", {}, 0),
    "dropout that is on": ("self.b(F.dropout(self.a(x), 1e-9))", {}, 0),
    "dropout that is off": ("self.b(F.dropout(self.a(x), 0.5, False))", {}, 1),
    "a cast to less": ("self.b(self.a(x).float().double())", {}, 0),
    "cropped": ("self.b(F.pad(self.a(x), (-1, -1)))", {}, 0),
    "padded with ones": ("self.b(F.pad(self.a(x), (1, 1, 1, 1), value=1.0))", {}, 0),
    "padding in words": ("self.b(self.a(x))", {"a": {"bias": False}, "b": {"padding": "same"}}, 1),
    "uneven padding": ("self.b(self.a(x))", {"b": {"padding": "same", "kernel_size": 2}}, 0),
    "padding behind a bias": ("self.b(self.a(x))", {"b": {"padding": 1}}, 0),
    "an average that is cut off": ("F.avg_pool2d(self.a(x), 4, ceil_mode=True)", {}, 1),
    "an average with zeros": ("F.avg_pool2d(self.a(x), 3, 2, 1)", {}, 0),
    "such without a bias": ("F.avg_pool2d(self.a(x), 3, 2, 1)", {"a": {"bias": False}}, 1),
    "an average without zeros": (
        "F.avg_pool2d(self.a(x), 3, 2, 1, count_include_pad=False)",
        {},
        1,
    ),
    "an adaptive average": ("F.adaptive_avg_pool2d(self.a(x), 4)", {}, 1),
    "an average over channels": ("self.a(x).mean((1, 2), keepdim=True)", {}, 0),
}


@pytest.mark.parametrize("given", [False, True], ids=["traced", "with inputs"])
@pytest.mark.parametrize("name", WAYS)
def test_ways_to_write_what_is_between(name: str, given: bool) -> None:  # noqa: FBT001  # drawn
    result, options, count = WAYS[name]
    sizes = {"a": {"kernel_size": 1}, "b": {"kernel_size": 3}}
    parts: dict[str, Any] = {
        key: nn.Conv2d(4, 4, **sizes[key] | options.get(key, {})) for key in sizes
    }
    model, x = net(result, **parts), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded = bnfx.fold_bn(model, x.clone() if given else None)
    assert_close(model, folded, [x])
    told = bnfx.report(folded)
    assert isinstance(told, FoldReport)
    assert len(told.merges) == count


@pytest.mark.parametrize("dims", [2, 3])
def test_products_are_linear_layers(dims: int) -> None:
    x, w = torch.randn(*[3] * (dims - 1), 4).double(), torch.randn(5, 6).double()
    model = net("torch.matmul(self.a(x) + self.c, self.w)", a=nn.Linear(4, 5), w=w, c=w[:, 0])
    assert merges(model, x) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype).eval()
    folded = bnfx.fold_bn(model)
    one, two = (layer.weight.detach().double() for layer in model)  # type: ignore[operator]
    assert torch.equal(folded.get_parameter("1.merged.weight"), (two @ one).to(dtype))


def test_what_a_weight_cannot_hold_is_not_merged() -> None:
    for factor in (1e-30, 1e30, torch.inf, torch.nan):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        with torch.no_grad():
            for layer in model:
                layer.weight.mul_(factor)  # type: ignore[operator]
        assert not bnfx.plan_fold(model).merges


def test_what_a_module_that_is_kept_whole_may_write_is_no_source() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)
            self.relu.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y, z = self.a(x), self.relu(x)
            w: Tensor = self.b(y) + z
            return w

    assert not merges(Net(), torch.randn(2, 4))


def test_long_networks_take_no_deep_recursion() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(100))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.relu(layer(x)) if layer.in_features == 4 else x
            for _ in range(400):
                x = x * 1.0
            return x

    assert not merges(Stream(), torch.randn(2, 4))


def test_layers_of_no_channels_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about nothing to draw
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4))
    assert not merges(model, torch.randn(2, 4))


def test_open_sizes_of_programs_stay_open() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.AvgPool2d(2))
    ).double()
    auto = torch.export.Dim.AUTO
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    folded = bnfx.fold_bn(program)
    assert (
        len(folded.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)) == 1
    )
    for size in (12, 17):
        x = torch.randn(3, 4, size, size + 1, dtype=torch.float64)
        torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-10, atol=1e-10)


def test_shared_weights_stay_for_their_other_readers() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(shared, nn.Conv2d(4, 4, 3), nn.ReLU(), shared, nn.ReLU())
    assert merges(model, torch.randn(2, 4, 8, 8)) == 1


def test_a_merge_survives_folding_again() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    )
    assert check_fold(model, torch.randn(2, 4, 8, 8)) == ["folded", "folded"]


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_with_other_values_parts(mode: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode))
    assert not merges(model, torch.randn(2, 4, 8, 8))
